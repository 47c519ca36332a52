def main(directory): raise SystemExit(1)
