//! The mount table: which EmbassyFS mounts there are, found without touching them.
//! Invariant: nothing here sends a request to the file system that is mounted, because its daemon may be stuck or be
//! the caller itself; only the parent of a mount point is resolved.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

/// What the mount table calls our file system.
pub const FS_TYPE: &str = "fuse.embassyfs";
/// A hundred thousand mounts, the most that the kernel allows in a namespace, with long names.
const TABLE_LEN_MAX: u64 = 64 << 20;
/// As many links in a row as the kernel follows.
const LINKS_MAX: usize = 40;

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// Number of this mount in the kernel, over all mount namespaces; given away again when the mount is gone.
    pub id: u64,
    /// Device number of the file system; the minor number is also the number of the FUSE connection.
    pub device: (u32, u32),
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// Options of this mount, comma-separated.
    pub options: String,
    /// Type, such as `fuse.embassyfs`.
    pub fs_type: String,
    /// Source (for us: `fsname=`).
    pub source: String,
    /// Options of the file system, comma-separated.
    pub super_options: String,
}

impl MountEntry {
    /// True for a mount of this program.
    pub fn is_ours(&self) -> bool {
        self.fs_type == FS_TYPE
    }

    /// The user the mount belongs to, as FUSE records it.
    pub fn user_id(&self) -> Option<u32> {
        self.super_options.split(',').find_map(|o| o.strip_prefix("user_id=")?.parse().ok())
    }
}

/// The mounts this process sees, in the table's order. Lines that are not understood are left out.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The mounts that another process sees, as far as its table is no longer than any that is used.
pub fn mounts_of(pid: u32) -> io::Result<Vec<MountEntry>> {
    let mut text = Vec::new();
    std::fs::File::open(format!("/proc/{pid}/mountinfo"))?.take(TABLE_LEN_MAX).read_to_end(&mut text)?;
    Ok(parse(&text))
}

/// The topmost mount at exactly `path` (which must be [`normalise`]d), if there is one.
pub fn find(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rev().find(|m| m.mount_point == path))
}

/// Parses the text of `/proc/self/mountinfo`.
pub fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    // id parent major:minor root mount_point options [optional fields ...] - type source super_options
    let mut fields = line.split(|b| *b == b' ');
    let id = text(fields.next()?);
    let device = text(fields.nth(1)?);
    let (major, minor) = device.split_once(':')?;
    let mount_point = unescape(fields.nth(1)?);
    let options = text(fields.next()?);
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    Some(MountEntry {
        id: id.parse().ok()?,
        device: (major.parse().ok()?, minor.parse().ok()?),
        mount_point: PathBuf::from(OsString::from_vec(mount_point)),
        options,
        fs_type: text(rest.next()?),
        source: String::from_utf8_lossy(&unescape(rest.next()?)).into_owned(),
        super_options: text(rest.next().unwrap_or_default()),
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(field).into_owned()
}

/// Undoes the kernel's `\040` for a space, and its kin.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|d| byte == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0u32, |n, d| n * 8 + u32::from(d - b'0'));
                out.push(value as u8);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// The absolute path that the mount table uses for `path`: links are followed, but the last component itself is
/// never asked anything that would reach a file system mounted there.
pub fn normalise(path: &Path) -> io::Result<PathBuf> {
    let mut path = std::path::absolute(path)?;
    for _ in 0..LINKS_MAX {
        if path.components().next_back() == Some(Component::ParentDir) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{}: give the mount point by its own name, not ending in '..'", path.display()),
            ));
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "/ cannot be the mount point"));
        };
        let real = std::fs::canonicalize(parent)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", parent.display())))?;
        path = real.join(name);
        if find(&path)?.is_some() {
            return Ok(path);
        }
        // Not a mount point, so looking at it is safe now.
        match std::fs::read_link(&path) {
            Ok(target) => path = real.join(target),
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

/// True when `path` can be a mount option value: no comma, which would end it, and no control character.
pub fn is_plain_value(path: &std::ffi::OsStr) -> bool {
    !path.as_bytes().iter().any(|b| *b == b',' || b.is_ascii_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
        90 27 0:52 / /srv/my\\040land\\134x rw,nosuid shared:5 master:1 - fuse.embassyfs embassyfs:land rw,user_id=7\n\
        bad line\n\
        91 27 0:x / /broken rw - t s rw\n\
        92 27 0:53 / /plain\\09 rw - ext4 /dev/x rw\n\
        93 27 0:54 / /cut rw";

    #[test]
    fn lines_with_escapes_and_optional_fields_are_read() {
        let all = parse(TABLE);
        assert_eq!(all.len(), 3);
        let ours = &all[1];
        assert_eq!(ours.mount_point, Path::new("/srv/my land\\x"));
        assert_eq!((ours.id, ours.device, ours.is_ours(), ours.user_id()), (90, (0, 52), true, Some(7)));
        assert_eq!(ours.source, "embassyfs:land");
        assert_eq!(all[2].mount_point, Path::new("/plain\\09"));
    }

    #[test]
    fn paths_are_made_real_up_to_the_last_component_and_links_followed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let real = dir.path().canonicalize().expect("it exists");
        std::fs::create_dir(real.join("m")).expect("writable");
        std::os::unix::fs::symlink("m", real.join("link")).expect("writable");
        std::os::unix::fs::symlink(&real, real.join("up")).expect("writable");
        assert_eq!(normalise(&real.join("up/link/")).expect("resolves"), real.join("m"));
        assert_eq!(normalise(&real.join("missing")).expect("resolves"), real.join("missing"));
        std::os::unix::fs::symlink("loop", real.join("loop")).expect("writable");
        assert!(normalise(&real.join("loop")).is_err());
        assert!(normalise(Path::new("/")).is_err() && normalise(Path::new("/tmp/..")).is_err());
    }
}
