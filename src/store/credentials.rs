//! Credentials of a bucket in a file that may be replaced at any time: a running mount takes the new ones up by itself.
//! Invariant: no value out of the file gets into a message, and a file that cannot be used leaves the last good
//! credentials in force.

use bytes::BytesMut;
use futures::future::{BoxFuture, FutureExt};
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use parking_lot::Mutex;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// No credentials are longer, in bytes.
const FILE_LEN_MAX: u64 = 64 << 10;

/// See the module. The file is looked at before each request.
pub(super) struct FileCredentials {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    /// What the file was when it was looked at last, usable or not; none while it could not be looked at.
    seen: Option<Stamp>,
    /// Why it was of no use then; said once.
    complaint: Option<String>,
    credential: Arc<AwsCredential>,
}

/// Tells one state of a file from the next.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(meta: &std::fs::Metadata) -> Stamp {
        Stamp {
            inode: (meta.dev(), meta.ino()),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl FileCredentials {
    /// The credentials in the file at `path`, which must be usable now.
    pub fn open(path: &Path) -> Result<FileCredentials, String> {
        if !path.is_absolute() {
            return Err("give the absolute path of the file".into());
        }
        let (seen, credential) = read(path).map_err(|why| format!("{}: {why}", path.display()))?;
        let state = State { seen: Some(seen), complaint: None, credential: Arc::new(credential) };
        Ok(FileCredentials { path: path.to_owned(), state: Mutex::new(state) })
    }

    fn current(&self) -> Arc<AwsCredential> {
        let mut state = self.state.lock();
        let now = std::fs::metadata(&self.path).ok().map(|meta| Stamp::of(&meta));
        if now.is_some() && now == state.seen {
            return state.credential.clone();
        }
        match read(&self.path) {
            Ok((seen, credential)) => {
                if *state.credential != credential {
                    ::log::info!("{}: new credentials are in force", self.path.display());
                }
                (state.seen, state.complaint) = (Some(seen), None);
                state.credential = Arc::new(credential);
            }
            Err(why) => {
                // Looked at again once it has changed; a file that is being replaced may be half there.
                state.seen = now;
                if state.complaint.as_ref() != Some(&why) {
                    ::log::error!(
                        "{}: {why}; the credentials read before stay in force",
                        self.path.display()
                    );
                    state.complaint = Some(why);
                }
            }
        }
        state.credential.clone()
    }
}

impl std::fmt::Debug for FileCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileCredentials({})", self.path.display())
    }
}

impl CredentialProvider for FileCredentials {
    type Credential = AwsCredential;

    fn get_credential<'a, 'f>(&'a self) -> BoxFuture<'f, object_store::Result<Arc<AwsCredential>>>
    where
        'a: 'f,
        Self: 'f,
    {
        std::future::ready(Ok(self.current())).boxed()
    }
}

/// Reads the file, through the handle by which it is looked at.
fn read(path: &Path) -> Result<(Stamp, AwsCredential), String> {
    let failed = |e: std::io::Error| format!("cannot be read: {e}");
    // Without O_NONBLOCK a path that names a pipe would wait for ever.
    let mut file: File =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() || meta.len() > FILE_LEN_MAX {
        return Err("is not a file of credentials".into());
    }
    if meta.mode() & 0o077 != 0 {
        let mode = meta.mode() & 0o777;
        return Err(format!("others may read or change it (mode {mode:03o}): chmod 600 it"));
    }
    let mut bytes = BytesMut::zeroed(meta.len() as usize);
    file.read_exact(&mut bytes).map_err(failed)?;
    let text = std::str::from_utf8(&bytes).map_err(|_| "is not text".to_string())?;
    Ok((Stamp::of(&meta), parse(text)?))
}

/// Lines `NAME=VALUE` as in an environment file: blank lines, `#` comments, `export` and quotes are understood.
fn parse(text: &str) -> Result<AwsCredential, String> {
    let (mut key_id, mut secret_key, mut token) = (None, None, None);
    for (n, line) in text.lines().enumerate() {
        let line = line.trim();
        let line = line.strip_prefix("export ").unwrap_or(line);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // The line itself is not shown: it may be half a secret.
        let (name, value) =
            line.split_once('=').ok_or_else(|| format!("line {} is not NAME=VALUE", n + 1))?;
        let value = unquoted(value.trim());
        let slot = match name.trim().to_ascii_uppercase().as_str() {
            "AWS_ACCESS_KEY_ID" => &mut key_id,
            "AWS_SECRET_ACCESS_KEY" => &mut secret_key,
            "AWS_SESSION_TOKEN" => &mut token,
            _ => return Err(format!("line {} has a name that is not known", n + 1)),
        };
        *slot = Some(value.to_owned()).filter(|value| !value.is_empty());
    }
    Ok(AwsCredential {
        key_id: key_id.ok_or("AWS_ACCESS_KEY_ID is missing")?,
        secret_key: secret_key.ok_or("AWS_SECRET_ACCESS_KEY is missing")?,
        token,
    })
}

fn unquoted(value: &str) -> &str {
    let within = |quote: char| value.strip_prefix(quote).and_then(|v| v.strip_suffix(quote));
    within('"').or_else(|| within('\'')).unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    fn put(path: &Path, text: &str, mode: u32) {
        let fresh = path.with_extension("new");
        std::fs::write(&fresh, text).unwrap();
        std::fs::set_permissions(&fresh, Permissions::from_mode(mode)).unwrap();
        std::fs::rename(&fresh, path).unwrap();
    }

    fn text(key: &str) -> String {
        format!("# renewed\nexport AWS_ACCESS_KEY_ID={key}\n\naws_secret_access_key = \"hush\"\n")
    }

    #[test]
    fn a_file_that_changes_is_taken_up_and_a_bad_one_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        put(&path, &text("one"), 0o600);
        let file = FileCredentials::open(&path).unwrap();
        let key = || file.current().key_id.clone();
        assert_eq!((key(), file.current().secret_key.as_str()), ("one".into(), "hush"));
        put(&path, &(text("two") + "AWS_SESSION_TOKEN='t=='\n"), 0o600);
        assert_eq!((key(), file.current().token.clone()), ("two".into(), Some("t==".into())));
        put(&path, "AWS_ACCESS_KEY_ID=thr", 0o600);
        assert_eq!(key(), "two", "half a file");
        put(&path, &text("three"), 0o644);
        assert_eq!(key(), "two", "a file that others may read");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(key(), "two", "no file");
        put(&path, &text("four"), 0o400);
        assert_eq!(key(), "four");
    }

    #[test]
    fn what_is_wrong_is_said_without_the_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        let cases = [
            ("AWS_ACCESS_KEY_ID=a\n", 0o600, "AWS_SECRET_ACCESS_KEY is missing"),
            ("hush-hush\n", 0o600, "line 1 is not NAME=VALUE"),
            ("hush=hush\n", 0o600, "line 1 has a name"),
            (&text("a"), 0o640, "chmod 600"),
        ];
        for (text, mode, words) in cases {
            put(&path, text, mode);
            let why = FileCredentials::open(&path).unwrap_err();
            assert!(why.contains(words) && !why.contains("hush"), "{why}");
        }
        assert!(FileCredentials::open(Path::new("relative")).unwrap_err().contains("absolute"));
        put(&path, &text("a"), 0o600);
        assert!(!format!("{:?}", FileCredentials::open(&path).unwrap()).contains("hush"));
    }
}
