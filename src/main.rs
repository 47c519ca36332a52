//! The `embassyfs` command. Everything is in the library; here only the exit code is handed to the system.

fn main() -> std::process::ExitCode {
    embassyfs::cli::run(std::env::args_os().collect()).into()
}
