//! From a URL and options to a store.
//! Invariant: what cannot work is refused here, with the forms that are accepted; no secret gets into a message.

use super::credentials::FileCredentials;
use super::local::LocalStore;
use super::remote::RemoteStore;
use super::retry::{RetryPolicy, RetryStore};
use super::{Store, StoreError};
use crate::clock::Env;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ClientConfigKey, ObjectStore, RetryConfig};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

const FORMS: &str =
    "use file:///directory, /directory, s3://bucket/prefix, az://container/prefix or gs://bucket/prefix";
/// The option that names a file with credentials, which is read again when it changes. S3 only.
pub const CREDENTIALS: &str = "credentials";
/// The option that says that the store has no put if absent, and that its user knows what is weaker then; its only value
/// is `emulated`. S3 only.
pub const PUT_IF_ABSENT: &str = "put_if_absent";
const CONNECT_TIMEOUT: &str = "5s";
/// Longer than the store adapter's own bounds, which know how much a request moves, for the largest of bodies.
const CLIENT_TIMEOUT: &str = "200000s";

/// Opens the store at `url`: `file:///directory` or an absolute path, `s3://bucket/prefix`, `az://container/prefix`,
/// `gs://bucket/prefix`. The environment (`AWS_*`, `AZURE_*`, `GOOGLE_*`) says how to reach it, and `options` override
/// that, with the names that `object_store` knows: `endpoint`, `region`, `access_key_id`, `secret_access_key`,
/// `allow_http`, `virtual_hosted_style_request`, `account_name`, `service_account`, ... and for S3 [`CREDENTIALS`].
/// Nothing is sent yet.
pub fn open(url: &str, options: &BTreeMap<String, String>) -> Result<Arc<dyn Store>, StoreError> {
    opened(url, options, LocalStore::new)
}

/// [`open`] for a store that is known to have been made: if it is a directory, and that is missing, every request is
/// `Unavailable` (the share it lies on may not be mounted) instead of an answer from an empty store.
pub fn open_existing(url: &str, options: &BTreeMap<String, String>) -> Result<Arc<dyn Store>, StoreError> {
    opened(url, options, LocalStore::existing)
}

fn opened(
    url: &str,
    options: &BTreeMap<String, String>,
    directory: fn(PathBuf) -> LocalStore,
) -> Result<Arc<dyn Store>, StoreError> {
    let store: Arc<dyn Store> = match url.split_once("://") {
        None if url.starts_with('/') => Arc::new(directory(local(url, url, options)?)),
        Some(("file", rest)) => {
            let path = rest.strip_prefix("localhost").unwrap_or(rest);
            if !path.starts_with('/') {
                return Err(bad_url(url));
            }
            Arc::new(directory(local(url, path, options)?))
        }
        Some((scheme @ ("s3" | "az" | "gs"), rest)) => {
            let place = Place::parse(url, scheme, rest)?;
            let bucket = match scheme {
                "s3" => s3(&place, options)?,
                "az" => azure(&place, options)?,
                _ => google(&place, options)?,
            };
            let store = RemoteStore::new(bucket, &place.prefix, place.url)?;
            Arc::new(if emulates(options) { store.look_first() } else { store })
        }
        _ => return Err(bad_url(url)),
    };
    Ok(Arc::new(RetryStore::new(store, Env::system(), RetryPolicy::default())))
}

fn emulates(options: &BTreeMap<String, String>) -> bool {
    spelled(options).any(|(key, _)| key == PUT_IF_ABSENT)
}

/// Where in the cloud.
struct Place {
    bucket: String,
    prefix: String,
    url: String,
}

impl Place {
    fn parse(url: &str, scheme: &str, rest: &str) -> Result<Place, StoreError> {
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        let odd = |c: char| !c.is_ascii_graphic() || matches!(c, '?' | '#' | '@' | '%' | '\\');
        let empty_part = !prefix.is_empty() && prefix.split('/').any(|part| matches!(part, "" | "." | ".."));
        if bucket.is_empty() || bucket.contains(':') || rest.contains(odd) || empty_part {
            return Err(bad_url(url));
        }
        let url = if prefix.is_empty() {
            format!("{scheme}://{bucket}")
        } else {
            format!("{scheme}://{bucket}/{prefix}")
        };
        Ok(Place { bucket: bucket.to_owned(), prefix: prefix.to_owned(), url })
    }
}

/// A fuzz target: the address of a store that may be anything.
#[cfg(feature = "fuzzing")]
pub fn fuzz_url(url: &str) {
    let _ = local(url, url, &BTreeMap::new());
    if let Some((scheme, rest)) = url.split_once("://")
        && let Ok(place) = Place::parse(url, scheme, rest)
    {
        assert!(!place.bucket.is_empty() && place.url.starts_with(scheme));
    }
    let shown = bad_url(url).to_string();
    assert!(!shown.is_empty());
}

/// The URL without what may be a password in it.
fn bad_url(url: &str) -> StoreError {
    let shown = match url.split_once("://") {
        Some((scheme, rest)) => match rest.rsplit_once('@') {
            Some((_, host)) => format!("{scheme}://***@{host}"),
            None => url.to_owned(),
        },
        None => url.to_owned(),
    };
    let shown = shown.split('?').next().unwrap_or_default();
    StoreError::denied(shown, format!("not the URL of a store; {FORMS}"))
}

fn unknown_option(url: &str, key: &str) -> StoreError {
    StoreError::denied(url, format!("unknown store option `{key}`"))
}

fn local(url: &str, path: &str, options: &BTreeMap<String, String>) -> Result<PathBuf, StoreError> {
    if let Some(key) = options.keys().next() {
        return Err(StoreError::denied(
            url,
            format!("a directory takes no store options, but `{key}` was given"),
        ));
    }
    let trimmed = path.trim_end_matches('/');
    Ok(PathBuf::from(if trimmed.is_empty() { "/" } else { trimmed }))
}

/// The options with the names as `object_store` spells them.
fn spelled(options: &BTreeMap<String, String>) -> impl Iterator<Item = (String, &String)> {
    options.iter().map(|(key, value)| {
        let key = key.to_ascii_lowercase().replace('-', "_");
        // The name other tools use.
        let known = if key == "virtual_hosted_style" { "virtual_hosted_style_request" } else { &key };
        (known.to_owned(), value)
    })
}

/// Requests are repeated by our own retry only: it knows what is safe to repeat and for how long.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, retry_timeout: Duration::from_secs(10), ..RetryConfig::default() }
}

fn s3(place: &Place, options: &BTreeMap<String, String>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    use AmazonS3ConfigKey::{Client, Endpoint, S3Endpoint};
    let mut builder = AmazonS3Builder::from_env()
        .with_config(Client(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT)
        .with_config(Client(ClientConfigKey::Timeout), CLIENT_TIMEOUT);
    for (key, value) in spelled(options) {
        if key == PUT_IF_ABSENT {
            if value != "emulated" {
                let why = format!(
                    "{PUT_IF_ABSENT}={value}: the only value is `emulated`, for a store that has none"
                );
                return Err(StoreError::denied(&place.url, why));
            }
            continue;
        }
        if key == CREDENTIALS {
            let file = FileCredentials::open(value.as_ref());
            let file = file.map_err(|why| StoreError::denied(&place.url, format!("credentials: {why}")))?;
            builder = builder.with_credentials(Arc::new(file));
            continue;
        }
        let known = key.parse().map_err(|_| unknown_option(&place.url, &key))?;
        builder = builder.with_config(known, value);
    }
    let endpoint = [Endpoint, S3Endpoint].iter().find_map(|key| builder.get_config_value(key));
    if let Some(plain) = endpoint.filter(|endpoint| endpoint.starts_with("http://")) {
        let allowed = builder.get_config_value(&Client(ClientConfigKey::AllowHttp));
        if is_loopback(&plain) {
            builder = builder.with_allow_http(true);
        } else if !allowed
            .is_some_and(|word| matches!(word.to_ascii_lowercase().as_str(), "true" | "1" | "on" | "yes"))
        {
            let detail = "the endpoint is plain http; use https, or allow it with the option allow_http=true";
            return Err(StoreError::denied(&place.url, detail));
        }
    }
    let bucket = builder
        .with_bucket_name(&place.bucket)
        // The chain's fencing stands on it; only who says that there is none goes without.
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(no_retries())
        .build()
        .map_err(|error| StoreError::denied(&place.url, error))?;
    Ok(Arc::new(bucket))
}

fn azure(place: &Place, options: &BTreeMap<String, String>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let mut builder = MicrosoftAzureBuilder::from_env()
        .with_config(AzureConfigKey::Client(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT)
        .with_config(AzureConfigKey::Client(ClientConfigKey::Timeout), CLIENT_TIMEOUT);
    for (key, value) in spelled(options) {
        let known = key.parse().map_err(|_| unknown_option(&place.url, &key))?;
        builder = builder.with_config(known, value);
    }
    let bucket = builder
        .with_container_name(&place.bucket)
        .with_retry(no_retries())
        .build()
        .map_err(|error| StoreError::denied(&place.url, error))?;
    Ok(Arc::new(bucket))
}

fn google(place: &Place, options: &BTreeMap<String, String>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_config(GoogleConfigKey::Client(ClientConfigKey::ConnectTimeout), CONNECT_TIMEOUT)
        .with_config(GoogleConfigKey::Client(ClientConfigKey::Timeout), CLIENT_TIMEOUT);
    for (key, value) in spelled(options) {
        let known = key.parse().map_err(|_| unknown_option(&place.url, &key))?;
        builder = builder.with_config(known, value);
    }
    let bucket = builder
        .with_bucket_name(&place.bucket)
        .with_retry(no_retries())
        .build()
        .map_err(|error| StoreError::denied(&place.url, error))?;
    Ok(Arc::new(bucket))
}

/// Whether a plain-http endpoint is on this host, so that nothing crosses a wire.
fn is_loopback(endpoint: &str) -> bool {
    let authority = endpoint.trim_start_matches("http://").split('/').next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    fn refusal(url: &str, pairs: &[(&str, &str)]) -> String {
        match open(url, &options(pairs)) {
            Ok(store) => panic!("{url} opened as {}", store.describe()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_bad_url_is_named_with_the_accepted_forms() {
        for url in
            ["", "relative", "s3://", "s3:///x", "ftp://a/b", "file://host/x", "s3://b/../x", "s3://b/a?b"]
        {
            assert!(refusal(url, &[]).contains("s3://bucket/prefix"), "{url}");
        }
        assert!(!refusal("s3://key:secret@bucket/x", &[]).contains("secret"));
    }

    #[test]
    fn urls_are_described_without_their_options() {
        let keys =
            [("endpoint", "http://127.0.0.1:9"), ("access-key-id", "k"), ("secret_access_key", "hush")];
        for (url, shown) in [("s3://bucket/a/b/", "s3://bucket/a/b"), ("s3://bucket", "s3://bucket")] {
            assert_eq!(open(url, &options(&keys)).unwrap().describe(), shown);
        }
        assert_eq!(open("/srv/x/", &options(&[])).unwrap().describe(), "file:///srv/x");
        assert_eq!(open("file:///srv/x", &options(&[])).unwrap().describe(), "file:///srv/x");
    }

    #[test]
    fn options_are_checked() {
        assert!(refusal("s3://b/p", &[("regoin", "x")]).contains("`regoin`"));
        assert!(refusal("s3://b/p", &[(PUT_IF_ABSENT, "off")]).contains("`emulated`"));
        let emulated = open("s3://b/p", &options(&[(PUT_IF_ABSENT, "emulated")])).unwrap();
        assert_eq!(emulated.describe(), "s3://b/p (put if absent is emulated)");
        assert!(refusal("/srv/x", &[("region", "x")]).contains("`region`"));
        let plain = ("endpoint", "http://store.example:9000");
        assert!(refusal("s3://b/p", &[plain]).contains("allow_http"));
        assert!(open("s3://b/p", &options(&[plain, ("allow_http", "true")])).is_ok());
    }

    #[test]
    fn only_this_host_is_loopback() {
        for endpoint in ["http://127.0.0.1:9000", "http://localhost/x", "http://[::1]:80", "http://127.8.0.1"]
        {
            assert!(is_loopback(endpoint), "{endpoint}");
        }
        for endpoint in ["http://localhost.example", "http://10.0.0.1", "http://127.0.0.1@evil.example"] {
            assert!(!is_loopback(endpoint), "{endpoint}");
        }
    }
}
