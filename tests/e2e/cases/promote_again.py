def main(directory, sites):
    pass
