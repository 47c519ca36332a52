//! `embassyfs drill`: mounts elsewhere, reads everything, holds it against home's manifest, and signs what it found.

use super::elsewhere::Elsewhere;
use super::exit::{ExitCode, Failure, Outcome};
use super::options::parse_duration;
use super::progress::Counting;
use super::reading::{ReadArgs, Reading};
use super::receipt::read_signed;
use super::{print, print_error, print_json, print_lines, seam, signals};
use crate::clock::{Clock, Env};
use crate::crypto::keyfile::{DrillKeyFile, Role};
use crate::crypto::sign::PublicKey;
use crate::fuse::{control_dir, past};
use crate::ops::drill::{Against, FORMAT, ReadTotals, Report, Rpo, ms_between};
use crate::ops::manifest::{self, Bad, Lines};
use crate::ops::newfile::NewFile;
use crate::ops::receipt::{Manifest, Untrue};
use crate::ops::signed::{Kind, open, seal};
use crate::ops::walk::Walk;
use crate::replica::receipt::chain_holds;
use crate::replica::{Io, parse_head};
use crate::types::unhex;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// How long the mount may take, how often it is looked how things are, and how long a stopped reader may go on.
const MOUNT_WAIT: Duration = Duration::from_secs(600);
const LOOK: Duration = Duration::from_millis(100);
const STOP_WAIT: Duration = Duration::from_secs(30);

/// Rehearse: mount the volume here, read everything, hold it against home's manifest, report and sign.
///
/// Mounts the newest version read-only with a fresh state directory and at a mount point of its own, by the same command
/// that operators use. Measures how long it takes until it is mounted, until the first byte, until all names are listed
/// and until everything is read (RTO), and how old the newest commit is (RPO). Compares every path with the manifest
/// that 'embassyfs manifest' made at home: in the newest version if that is the manifest's commit, otherwise in that
/// version beside it. Writes the signed report to FILE and a page for people to FILE.html. Run as root, as the manifest.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Whatever ends it (signals among them), nothing stays mounted. A report is also written when the volume cannot be mounted.

Exit codes:
  0  passed: everything was read, and is as home says
  9  not passed; the report says why: differences, unreadable files, not mounted, the manifest's commit is not there
  1  interrupted, or no report could be written   2  wrong usage   8  the key or the manifest is refused

Examples:
  embassyfs drill key /etc/embassyfs/drill.key
  embassyfs drill --store s3://embassy/land --key reader.key \\
    --manifest land.manifest --sign-key /etc/embassyfs/drill.key \\
    --report land-2026-11-24.json
  embassyfs drill check land-2026-11-24.json --public-key 5d41..."
)]
pub struct DrillArgs {
    #[command(subcommand)]
    sub: Option<Sub>,
    #[command(flatten)]
    read: ReadArgs,
    /// Home's manifest.
    #[arg(long, value_name = "FILE", required = true)]
    manifest: Option<PathBuf>,
    /// The new file for the signed report; the page for people is FILE.html.
    #[arg(long, value_name = "FILE", required = true)]
    report: Option<PathBuf>,
    /// The key that signs the report, made by 'embassyfs drill key'.
    #[arg(long, value_name = "FILE", required = true)]
    sign_key: Option<PathBuf>,
    /// Give up after this time.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    timeout: Duration,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Sub {
    Key(KeyArgs),
    Check(CheckArgs),
}

/// Make the key that signs the reports of drills; prints its public half, which whoever checks reports has to know.
#[derive(clap::Args)]
pub struct KeyArgs {
    /// The new file.
    file: PathBuf,
}

/// Check a report: its signature, that the page beside it says the same, and whether the drill passed.
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes:
  0  signed by this key, the page is the report's, and the drill passed
  9  FORGED OR ALTERED, another page, or a drill that did not pass")]
pub struct CheckArgs {
    /// The public key that 'embassyfs drill key' printed (64 hexadecimal digits), or the key file.
    #[arg(long, value_name = "HEX|KEYFILE")]
    public_key: String,
    /// The report as JSON.
    #[arg(long)]
    json: bool,
    /// The signed report.
    report: PathBuf,
}

/// Runs the command.
pub fn run(args: DrillArgs) -> Outcome {
    match args {
        DrillArgs { sub: Some(Sub::Key(args)), .. } => make_key(&args.file),
        DrillArgs { sub: Some(Sub::Check(args)), .. } => check(&args),
        DrillArgs { manifest: Some(manifest), report: Some(report), sign_key: Some(key), .. } => {
            drill(&args.read, &manifest, &report, &key, args.timeout, args.json)
        }
        _ => Err(Failure::usage("--manifest, --report and --sign-key are needed")),
    }
}

fn make_key(file: &Path) -> Outcome {
    let key = DrillKeyFile::generate(&Env::system());
    key.save(file).map_err(|e| Failure::from_error(ExitCode::Failed, "cannot write the key", &e))?;
    print(&crate::types::hex(&key.public().to_bytes()));
    Ok(ExitCode::Ok)
}

fn page_of(report: &Path) -> PathBuf {
    let mut name = report.as_os_str().to_os_string();
    name.push(".html");
    name.into()
}

fn check(args: &CheckArgs) -> Outcome {
    let key = match unhex(&args.public_key) {
        Some(bytes) => PublicKey::from_bytes(&bytes)
            .map_err(|_| Failure::usage(format!("'{}' is no public key", args.public_key)))?,
        None => load_key(Path::new(&args.public_key))?.public(),
    };
    let text = read_signed(&args.report)?;
    let found = |e: &dyn std::error::Error| {
        Failure::from_error(ExitCode::Found, args.report.display().to_string(), e)
    };
    let report: Report = open(Kind::Drill, &text, &key).map_err(|e| found(&e))?;
    let page = page_of(&args.report);
    match std::fs::read_to_string(&page) {
        Ok(there) if there == report.page(&crate::crypto::hash(&text).to_string()) => {}
        Ok(_) => {
            let what = format!("ALTERED: {} does not say what the signed report says", page.display());
            return Err(Failure::new(ExitCode::Found, what));
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            print_error(&format!("{} is not there, and was not looked at", page.display()));
        }
        Err(e) => return Err(Failure::from_error(ExitCode::Failed, page.display().to_string(), &e)),
    }
    show(&report, args.json)
}

fn show(report: &Report, json: bool) -> Outcome {
    match json {
        true => print_json(report)?,
        false => print_lines(&report.text()),
    }
    Ok(if report.passed { ExitCode::Ok } else { ExitCode::Found })
}

fn load_key(path: &Path) -> Result<DrillKeyFile, Failure> {
    DrillKeyFile::load(path).map_err(|e| Failure::from_error(ExitCode::Refused, "the drill's key", &e))
}

fn drill(
    read: &ReadArgs,
    manifest: &Path,
    report_to: &Path,
    sign_key: &Path,
    timeout: Duration,
    json: bool,
) -> Outcome {
    let failed = |what: &str, e: &io::Error| Failure::from_error(ExitCode::Failed, what, e);
    signals::block().map_err(|e| failed("blocking signals", &e))?; // before the first thread
    let key = load_key(sign_key)?;
    let reading = read.begin(Role::Reader)?;
    let volume = reading.place.key.volume.to_string();
    let opened = manifest::open(manifest, &reading.place.key.writer_public, Some(&volume));
    let (home, lines) = opened.map_err(|e| {
        let code = match &e {
            Bad::Io(_) => ExitCode::Failed,
            Bad::Untrue(Untrue::Broken(_) | Untrue::Volume(..) | Untrue::Format(..)) | Bad::Lines(_) => {
                ExitCode::Refused
            }
        };
        Failure::from_error(code, manifest.display().to_string(), &e)
    })?;
    let page = page_of(report_to);
    for path in [report_to, &page] {
        if path.exists() {
            return Err(Failure::new(
                ExitCode::Failed,
                format!("{} is there already, and a report is never written over", path.display()),
            )
            .hint("move it away, or choose another name"));
        }
    }
    let stop = Arc::new(AtomicBool::new(false));
    let watched = stop.clone();
    signals::watch(move |_| watched.store(true, Ordering::Relaxed))
        .map_err(|e| failed("watching for signals", &e))?;
    let mut run = Run { reading: &reading, home, stop, begun: reading.place.env.clock.monotonic(), timeout };
    let mut report = run.report(&key);
    run.go(&mut report, lines, read);
    if run.stop.load(Ordering::Relaxed) {
        return Err(Failure::new(ExitCode::Failed, "interrupted; nothing is mounted, no report is written"));
    }
    run.chain(&mut report);
    report.ended = Env::system().clock.now();
    report.judge();
    let text = seal(Kind::Drill, &report, &key.signing)
        .map_err(|e| Failure::from_error(ExitCode::Failed, "the report", &e))?;
    let page_text = report.page(&crate::crypto::hash(text.as_bytes()).to_string());
    for (path, text) in [(report_to, &text), (&page, &page_text)] {
        let wrote = NewFile::begin(path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.finish()
        });
        wrote.map_err(|e| failed(&format!("writing {}", path.display()), &e))?;
    }
    show(&report, json)
}

/// A drill under way.
struct Run<'a> {
    reading: &'a Reading,
    home: Manifest,
    stop: Arc<AtomicBool>,
    begun: Duration,
    timeout: Duration,
}

/// What the reader tells while it works.
enum Told {
    Reached(fn(&mut Report) -> &mut Option<u64>, u64),
    Ended(Box<Report>, io::Result<()>),
}

impl Run<'_> {
    fn now(&self) -> Duration {
        self.reading.place.env.clock.monotonic()
    }

    fn report(&self, key: &DrillKeyFile) -> Report {
        let Manifest { stand, holds } = &self.home;
        Report {
            format: FORMAT,
            name: stand.name.clone(),
            volume: stand.volume.clone(),
            store: self.reading.place.store.describe(),
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().into(),
            program: env!("CARGO_PKG_VERSION").into(),
            signed_by: crate::types::hex(&key.public().to_bytes()),
            began: Env::system().clock.now(),
            manifest: Against {
                commit: stand.commit,
                head: stand.head.clone(),
                blake3: holds.blake3.clone(),
                entries: holds.entries,
                compared: "newest".into(),
            },
            ..Report::default()
        }
    }

    /// Mounts, reads, unmounts. What goes wrong stands in the report.
    fn go(&mut self, report: &mut Report, lines: Lines, read: &ReadArgs) {
        let mut mount = match Elsewhere::start(
            &self.words(read),
            &self.reading.state().join("mount"),
            &self.reading.place.env,
        ) {
            Ok(mount) => mount,
            Err(e) => return report.findings.push(e.to_string()),
        };
        let stopped = || self.stop.load(Ordering::Relaxed);
        match mount.wait(self.timeout.min(MOUNT_WAIT), &stopped) {
            Ok(status) => {
                let top = self.stands(report, &mount.point, status.last_commit, status.head);
                self.read(report, lines, top, &mut mount);
            }
            Err(e) => {
                mount.break_off(); // in order it would have answered
                report.findings.push(e);
            }
        }
        if let Err(e) = mount.end() {
            report.findings.push(e);
        }
    }

    /// The words of the mount command: the store as it was given to us, so that no secret gets onto a command line.
    fn words(&self, read: &ReadArgs) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["--key".into(), self.reading.key.clone().into()];
        let mut add = |flag: &str, value: OsString| words.extend([flag.into(), value]);
        if let Some(config) = &read.store.config {
            add("--config", config.clone().into());
        }
        if let Some(store) = &read.store.store {
            add("--store", store.into());
        }
        for (name, value) in &read.store.store_options {
            add("--store-option", format!("{name}={value}").into());
        }
        words
    }

    /// Notes how new the mounted version is; where the manifest's is.
    fn stands(
        &self,
        report: &mut Report,
        point: &Path,
        newest: Option<crate::ops::status::CommitPoint>,
        head: Option<String>,
    ) -> PathBuf {
        let home = self.home.stand.commit;
        (report.newest, report.head) = (newest, head);
        let Some(newest) = newest else {
            report.findings.push("the store holds no commit".into());
            return point.to_path_buf();
        };
        report.rpo = Rpo {
            newest_age_ms: Some(ms_between(newest.time, report.began)),
            commits_ahead: Some(newest.no as i64 - home.no as i64),
            ahead_ms: Some(ms_between(home.time, newest.time)),
        };
        if newest.no < home.no {
            report.findings.push(format!(
                "the newest commit in the store is {}, the manifest's {}: the store was rolled back, or is another one",
                newest.no, home.no
            ));
        }
        if newest.no <= home.no {
            return point.to_path_buf();
        }
        report.manifest.compared = "past".into();
        point.join(control_dir::NAME).join(past::NAME).join(home.no.to_string())
    }

    /// Reads everything, in a thread of its own: what waits for the mount is let go by breaking that.
    fn read(&self, report: &mut Report, lines: Lines, top: PathBuf, mount: &mut Elsewhere) {
        let (tell, told) = mpsc::channel();
        let (entries, bytes) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let reader = Reader {
            clock: self.reading.place.env.clock.clone(),
            begun: self.begun,
            stop: Arc::new(AtomicBool::new(false)),
            tell,
            done: (entries.clone(), bytes.clone()),
            point: mount.point.clone(),
            top,
        };
        let (stop, empty) = (reader.stop.clone(), Box::new(Report::default()));
        if let Err(e) = std::thread::Builder::new().name("drill".into()).spawn(|| reader.run(lines, empty)) {
            return report.findings.push(format!("starting to read: {e}"));
        }
        let mut bar = Counting::new("drill");
        let mut broken: Option<(Duration, String)> = None;
        loop {
            match told.recv_timeout(LOOK) {
                Ok(Told::Reached(what, ms)) => *what(report) = Some(ms),
                Ok(Told::Ended(found, outcome)) => {
                    report.read = found.read.clone();
                    report.differences = found.differences.clone();
                    report.listed.clone_from(&found.listed);
                    if let (Err(e), None) = (outcome, &broken) {
                        report.findings.push(format!("reading stopped: {e}"));
                    }
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {
                    bar.show(entries.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    report.findings.push("the reader ended without a word".into());
                    break;
                }
            }
            let why = match () {
                () if self.stop.load(Ordering::Relaxed) => "interrupted".to_string(),
                () if self.now() - self.begun > self.timeout => {
                    format!("not done within {} s", self.timeout.as_secs())
                }
                () if !mount.alive() => format!("the mount ended: {}", mount.said()),
                () => continue,
            };
            if broken.is_none() {
                stop.store(true, Ordering::Relaxed);
                mount.break_off();
                broken = Some((self.now(), why));
            } else if broken.as_ref().is_some_and(|(since, _)| self.now() - *since > STOP_WAIT) {
                report.findings.push("the reader does not end".into());
                break;
            }
        }
        bar.finish();
        if let Some((_, why)) = broken {
            report.rto.read_ms = None;
            report.findings.push(why);
        }
    }

    /// The manifest's own segment must be part of the history.
    fn chain(&self, report: &mut Report) {
        let head = match parse_head(&self.home.stand.head) {
            Ok(head) => head,
            Err(e) => return report.findings.push(format!("the manifest's segment: {e}")),
        };
        let io = Io::on(self.reading.runtime.handle());
        match chain_holds(&self.reading.place, head, &io) {
            Ok((holds, findings)) => {
                if let Err(why) = holds {
                    report.findings.push(format!("the manifest's segment is NOT IN THE CHAIN: {why}"));
                }
                let told = findings.iter().map(|finding| format!("{}: {}", finding.object, finding.detail));
                report.findings.extend(told);
            }
            Err(e) => report.findings.push(seam::failure(&e).to_string()),
        }
    }
}

/// What reads; all that may wait for the mount is here.
struct Reader {
    clock: Arc<dyn Clock>,
    begun: Duration,
    stop: Arc<AtomicBool>,
    tell: mpsc::Sender<Told>,
    /// Entries and bytes, for the progress bar.
    done: (Arc<AtomicU64>, Arc<AtomicU64>),
    point: PathBuf,
    top: PathBuf,
}

impl Reader {
    fn reached(&self, what: fn(&mut Report) -> &mut Option<u64>) {
        let ms = u64::try_from((self.clock.monotonic() - self.begun).as_millis()).unwrap_or(u64::MAX);
        let _ = self.tell.send(Told::Reached(what, ms)); // who does not listen any more has ended
    }

    fn run(self, mut lines: Lines, mut found: Box<Report>) {
        let outcome = self.all(&mut lines, &mut found);
        let _ = self.tell.send(Told::Ended(found, outcome));
    }

    fn all(&self, lines: &mut Lines, found: &mut Report) -> io::Result<()> {
        std::fs::symlink_metadata(&self.point)?;
        self.reached(|report| &mut report.rto.mounted_ms);
        let mut names = 0;
        let mut first = false;
        for name in
            Walk::new(&self.top).map_while(|name| (!self.stop.load(Ordering::Relaxed)).then_some(name))
        {
            names += 1;
            self.done.0.store(names, Ordering::Relaxed);
            // What cannot be listed is told of when it is compared.
            if let (false, Ok(name)) = (first, name)
                && first_byte(&name.real)
            {
                first = true;
                self.reached(|report| &mut report.rto.first_byte_ms);
            }
        }
        self.reached(|report| &mut report.rto.find_ms);
        found.read.names = names;
        found.compare(&self.top, lines, &self.stop, &mut |done: &ReadTotals| {
            self.done.0.store(done.entries, Ordering::Relaxed);
            self.done.1.store(done.bytes, Ordering::Relaxed);
        })?;
        self.reached(|report| &mut report.rto.read_ms);
        Ok(())
    }
}

/// Reads the first byte, if that is a file that has one.
fn first_byte(path: &Path) -> bool {
    let is_file = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() > 0);
    is_file && std::fs::File::open(path).and_then(|mut file| file.read(&mut [0])).is_ok_and(|n| n == 1)
}
