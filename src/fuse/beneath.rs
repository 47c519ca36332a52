//! Mounting in the place of a dead mount, so that at no moment the directory below can be seen.
//! Invariant: the new mount is under the dead one before that is taken away. Where the kernel (before 6.5) or the
//! privileges do not suffice, there is a moment between the two; that is the caller's to know.

use super::mount::{MountSettings, Unmount, own_ids, unmount};
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

/// From linux/mount.h.
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const SET_FLAG: libc::c_uint = 0;
const SET_STRING: libc::c_uint = 1;
const CMD_CREATE: libc::c_uint = 6;
const MOUNT_ATTR_RDONLY: libc::c_uint = 0x01;
const MOUNT_ATTR_NOSUID: libc::c_uint = 0x02;
const MOUNT_ATTR_NODEV: libc::c_uint = 0x04;
const MOUNT_ATTR_NOEXEC: libc::c_uint = 0x08;
const MOUNT_ATTR_NOATIME: libc::c_uint = 0x10;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 0x04;
const MOVE_MOUNT_BENEATH: libc::c_uint = 0x200;

/// Mounts beneath what is mounted at the place, and takes that away. Returns the connection to the kernel.
pub fn replace(settings: &MountSettings) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let mount = detached(settings, device.as_raw_fd())?;
    let target = CString::new(settings.mountpoint.as_os_str().as_bytes())?;
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_BENEATH;
    // SAFETY: both paths are NUL-terminated strings that outlive the call; `mount` is open.
    checked(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            flags,
        )
    })?;
    unmount(&settings.mountpoint, Unmount::Lazy)?;
    Ok(OwnedFd::from(device))
}

/// A mount that is nowhere yet.
fn detached(settings: &MountSettings, device: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the name is a NUL-terminated string.
    let context = opened(unsafe { libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), FSOPEN_CLOEXEC) })?;
    let set = |key: &str, value: Option<&str>| -> io::Result<()> {
        let key = CString::new(key)?;
        let value = value.map(CString::new).transpose()?;
        let pointer = value.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
        let command = if value.is_some() { SET_STRING } else { SET_FLAG };
        let fd = context.as_raw_fd();
        // SAFETY: `key`, and the value where there is one, are NUL-terminated strings that outlive the call.
        checked(unsafe { libc::syscall(libc::SYS_fsconfig, fd, command, key.as_ptr(), pointer, 0) })
    };
    let (user, group) = own_ids();
    set("source", Some(&settings.fsname))?;
    set("subtype", Some("embassyfs"))?;
    set("fd", Some(&device.to_string()))?;
    set("rootmode", Some("40000"))?;
    set("user_id", Some(&user.to_string()))?;
    set("group_id", Some(&group.to_string()))?;
    set("default_permissions", None)?;
    if settings.allow_other {
        set("allow_other", None)?;
    }
    if settings.read_only {
        set("ro", None)?;
    }
    let fd = context.as_raw_fd();
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: this command takes neither key nor value.
    checked(unsafe { libc::syscall(libc::SYS_fsconfig, fd, CMD_CREATE, none, none, 0) })?;
    // SAFETY: takes integers only.
    opened(unsafe { libc::syscall(libc::SYS_fsmount, fd, FSMOUNT_CLOEXEC, attributes(settings)) })
}

fn attributes(settings: &MountSettings) -> libc::c_uint {
    let all = [
        (settings.read_only, MOUNT_ATTR_RDONLY),
        (!settings.suid, MOUNT_ATTR_NOSUID),
        (!settings.dev, MOUNT_ATTR_NODEV),
        (!settings.exec, MOUNT_ATTR_NOEXEC),
        (!settings.relatime, MOUNT_ATTR_NOATIME),
    ];
    all.iter().filter(|(on, _)| *on).fold(0, |flags, (_, flag)| flags | flag)
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn opened(result: libc::c_long) -> io::Result<OwnedFd> {
    checked(result)?;
    // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
