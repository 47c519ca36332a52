//! Mounting and unmounting: mount(2) as root, `fusermount3` for others.
//! Invariant: what is given to the kernel as an option value holds no comma, so that no value can smuggle in
//! another option; and a mount point that is already served is never mounted over.

use super::pass::receive_fd;
use super::table::{self, FS_TYPE};
use std::ffi::{CString, OsString};
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long `fusermount3` may take to hand over the connection.
const HELPER_WAIT: Duration = Duration::from_secs(20);

/// How a volume is mounted. Permissions are always checked by the kernel (`default_permissions`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSettings {
    /// Where, as [`table::normalise`] gives it.
    pub mountpoint: PathBuf,
    /// Source in the mount table.
    pub fsname: String,
    /// Other users than the one who mounts may enter.
    pub allow_other: bool,
    /// No writes.
    pub read_only: bool,
    /// Set-user-id bits count (off unless asked for: the volume's content is not the host's).
    pub suid: bool,
    /// Device files work (off unless asked for).
    pub dev: bool,
    /// Programs can be run from it.
    pub exec: bool,
    /// What the mount table says of access times; the kernel keeps none for FUSE file systems, the daemon does.
    pub relatime: bool,
    /// How far the kernel reads ahead, in KiB; 0 leaves its default.
    pub read_ahead_kib: u32,
}

impl MountSettings {
    /// The usual settings for a mount at `mountpoint`.
    pub fn new(mountpoint: PathBuf, fsname: String) -> MountSettings {
        MountSettings {
            mountpoint,
            fsname,
            allow_other: false,
            read_only: false,
            suid: false,
            dev: false,
            exec: true,
            relatime: false,
            read_ahead_kib: 2048,
        }
    }

    fn flags(&self) -> libc::c_ulong {
        let flag = |on: bool, flag: libc::c_ulong| if on { flag } else { 0 };
        flag(self.read_only, libc::MS_RDONLY)
            | flag(!self.suid, libc::MS_NOSUID)
            | flag(!self.dev, libc::MS_NODEV)
            | flag(!self.exec, libc::MS_NOEXEC)
            | flag(!self.relatime, libc::MS_NOATIME)
    }

    /// The option text for mount(2).
    fn kernel_data(&self, fd: RawFd, user: u32, group: u32) -> String {
        let mut data = format!("fd={fd},rootmode=40000,user_id={user},group_id={group},default_permissions");
        if self.allow_other {
            data.push_str(",allow_other");
        }
        data
    }

    /// The option text for `fusermount3`, which understands only its own set.
    fn helper_options(&self) -> String {
        let mut text = format!("fsname={},subtype=embassyfs,default_permissions", self.fsname);
        let switches = [
            (self.allow_other, "allow_other"),
            (self.read_only, "ro"),
            (!self.suid, "nosuid"),
            (!self.dev, "nodev"),
            (!self.exec, "noexec"),
            (!self.relatime, "noatime"),
        ];
        for (_, name) in switches.iter().filter(|(on, _)| *on) {
            // Writing to a String cannot fail.
            let _ = write!(text, ",{name}");
        }
        text
    }
}

/// Says why nothing can be mounted at `mountpoint` (normalised), if that is so.
pub fn check_mountpoint(mountpoint: &Path) -> io::Result<()> {
    let refuse = |kind, text: String| Err(io::Error::new(kind, text));
    // The table first: a look at a dead or stuck mount fails or hangs.
    match table::find(mountpoint)? {
        Some(m) if m.is_ours() => {
            let text = format!("an EmbassyFS volume ({}) is already mounted there", m.source);
            return refuse(io::ErrorKind::ResourceBusy, text);
        }
        Some(m) if m.fs_type.starts_with("fuse") => {
            let text = format!("a file system of type {} is mounted there", m.fs_type);
            return refuse(io::ErrorKind::ResourceBusy, text);
        }
        _ => {}
    }
    if !std::fs::metadata(mountpoint)?.is_dir() {
        return refuse(io::ErrorKind::NotADirectory, "it is not a directory".into());
    }
    Ok(())
}

/// Mounts and returns the connection to the kernel. Until somebody serves it, whoever looks at the mount waits.
pub fn mount(settings: &MountSettings) -> io::Result<OwnedFd> {
    if !table::is_plain_value(settings.fsname.as_ref()) {
        let text = format!("fsname '{}' must hold no comma", settings.fsname);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    check_mountpoint(&settings.mountpoint)?;
    match mount_directly(settings) {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => mount_by_helper(settings),
        done => done,
    }
}

fn mount_directly(settings: &MountSettings) -> io::Result<OwnedFd> {
    let device =
        OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                let text = format!("/dev/fuse: {e}; load the kernel module with 'modprobe fuse'");
                io::Error::new(io::ErrorKind::NotFound, text)
            }
            _ => e,
        })?;
    let (user, group) = own_ids();
    let source = CString::new(settings.fsname.as_bytes())?;
    let target = CString::new(settings.mountpoint.as_os_str().as_bytes())?;
    let fs_type = CString::new(FS_TYPE)?;
    let data = CString::new(settings.kernel_data(device.as_raw_fd(), user, group))?;
    // SAFETY: the four pointers are to NUL-terminated strings that outlive the call, and the kernel copies them.
    let failed = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            fs_type.as_ptr(),
            settings.flags(),
            data.as_ptr().cast(),
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(OwnedFd::from(device))
}

/// Changes the flags of a mount to those of `settings`; the daemon goes on and is not asked.
pub fn remount(settings: &MountSettings) -> io::Result<()> {
    let target = CString::new(settings.mountpoint.as_os_str().as_bytes())?;
    let flags = settings.flags() | libc::MS_REMOUNT;
    // SAFETY: `target` is a NUL-terminated string that outlives the call; with MS_REMOUNT the kernel looks at neither
    // source nor type, and FUSE takes no data.
    match unsafe { libc::mount(std::ptr::null(), target.as_ptr(), std::ptr::null(), flags, std::ptr::null()) }
    {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lets the set-user-id helper mount; it hands the connection back over its standard input, which is a socket.
fn mount_by_helper(settings: &MountSettings) -> io::Result<OwnedFd> {
    if settings.suid || settings.dev {
        let text = "only root may mount with the options 'suid' and 'dev'";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(HELPER_WAIT))?;
    let mut child = Command::new(helper_program())
        .arg("-o")
        .arg(settings.helper_options())
        .arg("--")
        .arg(&settings.mountpoint)
        .env("_FUSE_COMMFD", "0")
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(helper_missing)?;
    let received = receive_fd(&ours);
    if received.is_err() {
        // It may still wait for us; it must not outlive the attempt.
        let _ = child.kill();
    }
    let output = child.wait_with_output()?;
    received.map_err(|e| {
        let words = String::from_utf8_lossy(&output.stderr);
        let words = words.trim();
        let text = if words.is_empty() { format!("fusermount3: {e}") } else { words.to_string() };
        io::Error::new(io::ErrorKind::PermissionDenied, text)
    })
}

fn helper_program() -> OsString {
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
        std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file())
    };
    let found = on_path("fusermount3").or_else(|| on_path("fusermount"));
    found.map_or_else(|| "fusermount3".into(), PathBuf::into_os_string)
}

fn helper_missing(e: io::Error) -> io::Error {
    let text = format!("only root may mount without fusermount3 (package fuse3), which cannot be run: {e}");
    io::Error::new(io::ErrorKind::PermissionDenied, text)
}

/// How firmly to unmount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unmount {
    /// Fails with `EBUSY` while somebody uses it.
    Normal,
    /// Gone from the tree at once; it ends when the last user leaves.
    Lazy,
    /// Breaks the connection; users get errors.
    Force,
}

/// Unmounts what is mounted at `mountpoint`. May wait for the daemon; a caller that must not, uses
/// [`unmount_bounded`].
pub fn unmount(mountpoint: &Path, how: Unmount) -> io::Result<()> {
    let target = CString::new(mountpoint.as_os_str().as_bytes())?;
    match umount2(&target, how) {
        0 => Ok(()),
        libc::EPERM => unmount_by_helper(mountpoint, how),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Like [`unmount`], but gives up waiting after `limit` with `TimedOut`: umount2 of a mount whose daemon is stuck
/// cannot be interrupted, so it runs in a process of its own.
pub fn unmount_bounded(mountpoint: &Path, how: Unmount, limit: Duration) -> io::Result<()> {
    let target = CString::new(mountpoint.as_os_str().as_bytes())?;
    // SAFETY: the child calls umount2 and _exit only, both async-signal-safe; its argument was made before the fork.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            let errno = umount2(&target, how);
            // SAFETY: ends the child without running this process's exit handlers.
            unsafe { libc::_exit(errno.clamp(0, 255)) }
        }
        _ => {}
    }
    let ended = Pidfd::open(pid as u32)?.wait(limit)?;
    if !ended {
        return Err(io::Error::from(io::ErrorKind::TimedOut));
    }
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result, and `pid` is our own child that was not waited for yet.
    if unsafe { libc::waitpid(pid, &mut status, 0) } != pid {
        return Err(io::Error::last_os_error());
    }
    match libc::WEXITSTATUS(status) {
        0 => Ok(()),
        libc::EPERM => unmount_by_helper(mountpoint, how),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn umount2(target: &CString, how: Unmount) -> i32 {
    let flags = match how {
        Unmount::Normal => 0,
        Unmount::Lazy => libc::MNT_DETACH,
        Unmount::Force => libc::MNT_DETACH | libc::MNT_FORCE,
    };
    // SAFETY: `target` is a NUL-terminated string that outlives the call.
    match unsafe { libc::umount2(target.as_ptr(), flags | libc::UMOUNT_NOFOLLOW) } {
        0 => 0,
        _ => io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
    }
}

fn unmount_by_helper(mountpoint: &Path, how: Unmount) -> io::Result<()> {
    let mut command = Command::new(helper_program());
    command.arg("-u");
    if how != Unmount::Normal {
        command.arg("-z");
    }
    let output = command.arg("--").arg(mountpoint).current_dir("/").stdin(Stdio::null()).output();
    let output = output.map_err(helper_missing)?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_string();
    let busy = words.to_ascii_lowercase().contains("busy");
    let kind = if busy { io::ErrorKind::ResourceBusy } else { io::ErrorKind::PermissionDenied };
    Err(io::Error::new(kind, words))
}

/// Tells the kernel how far to read ahead on the mount with this device number. Best effort: it costs speed only.
pub fn set_read_ahead(device: (u32, u32), kib: u32) -> io::Result<()> {
    std::fs::write(format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.0, device.1), kib.to_string())
}

/// A process that can be waited for without mistaking a later one with the same number for it.
pub struct Pidfd(File);

impl Pidfd {
    /// The process that has this number now.
    pub fn open(pid: u32) -> io::Result<Pidfd> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(Pidfd(File::from(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })))
    }

    /// Waits until the process has ended; false when it has not within `limit`.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        readable_within(self.0.as_fd(), limit)
    }
}

/// Waits until `fd` can be read (or is at its end); false when it cannot within `limit`.
pub fn readable_within(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    loop {
        // SAFETY: one valid pollfd, and the count says one.
        match unsafe { libc::poll(&mut entry, 1, ms) } {
            0 => return Ok(false),
            1 => return Ok(true),
            // A signal; the wait starts anew, which is bounded well enough.
            _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
            _ => return Err(io::Error::last_os_error()),
        }
    }
}

/// Effective user and group of this process.
pub fn own_ids() -> (u32, u32) {
    // SAFETY: these calls take nothing and cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_gets_safe_defaults() {
        let mut settings = MountSettings::new("/m".into(), "embassyfs:x".into());
        assert_eq!(settings.flags(), libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOATIME);
        assert_eq!(
            settings.kernel_data(3, 1, 2),
            "fd=3,rootmode=40000,user_id=1,group_id=2,default_permissions"
        );
        settings.read_only = true;
        settings.allow_other = true;
        assert_eq!(
            settings.helper_options(),
            "fsname=embassyfs:x,subtype=embassyfs,default_permissions,allow_other,ro,nosuid,nodev,noatime"
        );
        assert!(settings.kernel_data(3, 1, 2).ends_with(",allow_other"));
    }

    #[test]
    fn values_with_commas_and_wrong_mount_points_are_refused() {
        let settings = MountSettings::new("/m".into(), "x,allow_other".into());
        assert_eq!(mount(&settings).expect_err("comma").kind(), io::ErrorKind::InvalidInput);
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let error = check_mountpoint(file.path()).expect_err("a file");
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
    }
}
