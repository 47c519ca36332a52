//! Signed documents: a JSON body and a signature over exactly its bytes, in a text file that people can read.
//! Invariant: a document that opens is, byte for byte, what the holder of the key signed as a document of that kind;
//! nothing of a body is looked at before. Bytes: `docs/format.md`, "Signed documents".

use crate::crypto::sign::{PublicKey, SIGNATURE_LEN, SecretKey};
use crate::types::{hex, unhex};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a document is; part of what is signed, so that none can be taken for another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// That a file's contents are durable abroad.
    Receipt,
    /// What a version of a volume holds.
    Manifest,
    /// How a drill went.
    Drill,
}

/// Why a document is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// It does not have the form of one.
    #[error("this is no {0}, or it was cut off, altered or written anew: {1}")]
    Form(&'static str, String),
    /// Its signature does not fit.
    #[error("FORGED OR ALTERED: the signature of the {0} does not fit its text and the key {1}")]
    Signature(&'static str, String),
}

const BEHIND: &str = ",\n\"signature\": \"";
const END: &str = "\"\n}\n";
const TAIL: usize = BEHIND.len() + 2 * SIGNATURE_LEN + END.len();

impl Kind {
    /// Its name, for people and in the file.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Receipt => "receipt",
            Kind::Manifest => "manifest",
            Kind::Drill => "drill",
        }
    }

    /// How a document of this kind begins.
    pub fn opening(self) -> String {
        format!("{{\n\"{}\": ", self.word())
    }

    fn message(self, body: &[u8]) -> Vec<u8> {
        let mut message = format!("embassyfs v1 {} signature\0", self.word()).into_bytes();
        message.extend_from_slice(body);
        message
    }
}

/// The document that says `body`.
pub fn seal(kind: Kind, body: &impl Serialize, key: &SecretKey) -> Result<String, serde_json::Error> {
    let body = serde_json::to_string_pretty(body)?;
    let signature = hex(&key.sign(&kind.message(body.as_bytes())));
    Ok(format!("{}{body}{BEHIND}{signature}{END}", kind.opening()))
}

/// The parts of a document that claims to be of this kind: its body and its signature, neither of them believed.
fn parts(kind: Kind, text: &[u8]) -> Result<(&[u8], [u8; SIGNATURE_LEN]), Broken> {
    let form = |why: &str| Broken::Form(kind.word(), why.to_string());
    let rest = text.strip_prefix(kind.opening().as_bytes()).ok_or_else(|| form("its beginning"))?;
    let at = rest.len().checked_sub(TAIL).ok_or_else(|| form("its length"))?;
    let (body, tail) = rest.split_at(at);
    let digits = tail.strip_prefix(BEHIND.as_bytes()).and_then(|tail| tail.strip_suffix(END.as_bytes()));
    let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
    let small = |digits: &&str| !digits.bytes().any(|b| b.is_ascii_uppercase());
    let signature = digits.filter(small).and_then(unhex).ok_or_else(|| form("its end"))?;
    Ok((body, signature))
}

/// What a document says, if this key signed it.
pub fn open<T: DeserializeOwned>(kind: Kind, text: &[u8], key: &PublicKey) -> Result<T, Broken> {
    let (body, signature) = parts(kind, text)?;
    let forged = |_| Broken::Signature(kind.word(), hex(&key.to_bytes()));
    key.verify(&kind.message(body), &signature).map_err(forged)?;
    serde_json::from_slice(body).map_err(|e| Broken::Form(kind.word(), e.to_string()))
}

/// What a document claims, signed or not: good only for saying why it is refused.
pub fn claimed<T: DeserializeOwned>(kind: Kind, text: &[u8]) -> Option<T> {
    serde_json::from_slice(parts(kind, text).ok()?.0).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_document_opens_as_it_was_signed_and_not_otherwise() {
        let key = SecretKey::from_bytes(&[7; 32]);
        let text = seal(Kind::Receipt, &("a", 1), &key).expect("plain data");
        let public = key.public();
        let opened: Result<(String, u32), Broken> = open(Kind::Receipt, text.as_bytes(), &public);
        assert_eq!(opened, Ok(("a".to_string(), 1)));
        for at in 0..text.len() {
            let mut bent = text.clone().into_bytes();
            bent[at] ^= 1;
            assert!(open::<(String, u32)>(Kind::Receipt, &bent, &public).is_err(), "byte {at}");
        }
        let other = SecretKey::from_bytes(&[8; 32]).public();
        let refused = open::<(String, u32)>(Kind::Receipt, text.as_bytes(), &other);
        assert!(matches!(refused, Err(Broken::Signature(..))), "{refused:?}");
        // The same text under another name is not the same statement.
        let renamed = text.replacen("receipt", "drill", 1);
        let refused = open::<(String, u32)>(Kind::Drill, renamed.as_bytes(), &public);
        assert!(matches!(refused, Err(Broken::Signature(..))), "{refused:?}");
        for end in 0..text.len() {
            assert!(open::<(String, u32)>(Kind::Receipt, &text.as_bytes()[..end], &public).is_err());
        }
        assert_eq!(claimed(Kind::Receipt, text.as_bytes()), Some(("a".to_string(), 1)));
    }
}
