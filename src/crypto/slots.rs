//! Slots of the superblock: the volume key, wrapped so that one secret opens it. Today the secret is a passphrase.
//! Invariant: a slot opens only for the volume and key id it was made for, and only with the very parameters it was
//! made with; parameters from a store are not obeyed beyond named limits. A slot of a kind that is not known here is
//! kept and shown, never used. Bytes: `docs/format.md`, "volume.json".

use super::keys::{DerivedKey, Purpose, VolumeKey};
use super::seal::{Sealer, TAG_LEN};
use crate::clock::Env;
use crate::types::{VolumeId, hex, unhex};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use zeroize::{Zeroize, Zeroizing};

/// Most memory a slot may ask for, in KiB (4 GiB): volume.json comes from a store that is not trusted.
pub const M_COST_KIB_MAX: u32 = 4 * 1024 * 1024;
/// Most passes a slot may ask for.
pub const T_COST_MAX: u32 = 64;
/// Most lanes a slot may ask for.
pub const P_COST_MAX: u32 = 16;

const PASSPHRASE_KIND: &str = "passphrase-argon2id";
const SALT_LEN: usize = 16;
const WRAPPED_LEN: usize = 32 + TAG_LEN;

/// Why a slot cannot be made or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// The slot did not open: another passphrase, or the slot belongs to another volume or was altered.
    #[error("the passphrase does not open this slot (a typing error, or the slot is damaged)")]
    WrongPassphrase,
    /// The passphrase is empty.
    #[error("the passphrase is empty")]
    EmptyPassphrase,
    /// The Argon2id parameters are outside what this program accepts.
    #[error("the slot asks for Argon2id {0}")]
    Parameters(String),
    /// This host cannot give Argon2id the memory that the slot asks for.
    #[error("opening the slot needs {0} KiB of memory, which this host does not give")]
    OutOfMemory(u32),
    /// The slot is of a kind that this program does not know.
    #[error("a slot of kind \"{0}\" needs a newer version of embassyfs")]
    UnknownKind(String),
}

/// Cost of one guess at a passphrase. Stored in the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argon2Params {
    /// Memory in KiB.
    pub m_cost_kib: u32,
    /// Passes over the memory.
    pub t_cost: u32,
    /// Lanes.
    pub p_cost: u32,
}

impl Default for Argon2Params {
    /// 256 MiB, three passes, one lane: about a second on a server.
    fn default() -> Argon2Params {
        Argon2Params { m_cost_kib: 256 * 1024, t_cost: 3, p_cost: 1 }
    }
}

impl Argon2Params {
    fn check(self) -> Result<argon2::Params, SlotError> {
        let limit = |what: &str, asked: u32, max: u32| {
            if asked <= max {
                Ok(())
            } else {
                Err(SlotError::Parameters(format!("{what} {asked}; at most {max} is accepted")))
            }
        };
        limit("memory (KiB)", self.m_cost_kib, M_COST_KIB_MAX)?;
        limit("passes", self.t_cost, T_COST_MAX)?;
        limit("lanes", self.p_cost, P_COST_MAX)?;
        argon2::Params::new(self.m_cost_kib, self.t_cost, self.p_cost, Some(32)).map_err(|e| {
            SlotError::Parameters(format!(
                "memory {} KiB, passes {}, lanes {}: {e}",
                self.m_cost_kib, self.t_cost, self.p_cost
            ))
        })
    }
}

/// A slot of the superblock.
#[derive(Clone, Debug, PartialEq)]
pub enum Slot {
    /// Opened by a passphrase.
    Passphrase(PassphraseSlot),
    /// Of a kind that this program does not know; kept as it is.
    Unknown {
        /// Its kind.
        kind: String,
        /// All its fields, the kind among them.
        fields: Map<String, Value>,
    },
}

/// The volume key under a key that Argon2id makes of a passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassphraseSlot {
    params: Argon2Params,
    salt: [u8; SALT_LEN],
    wrapped: [u8; WRAPPED_LEN],
}

impl Slot {
    /// The kind, as the format names it.
    pub fn kind(&self) -> &str {
        match self {
            Slot::Passphrase(_) => PASSPHRASE_KIND,
            Slot::Unknown { kind, .. } => kind,
        }
    }
}

/// Wraps `key` so that `passphrase` opens it. Takes the time and memory that `params` name.
pub fn wrap_passphrase(
    env: &Env,
    volume: &VolumeId,
    key_id: u32,
    key: &VolumeKey,
    passphrase: &[u8],
    params: Argon2Params,
) -> Result<Slot, SlotError> {
    let salt = env.random_bytes();
    let bound = binding(volume, key_id, params, &salt);
    let sealer = Sealer::new(&stretch(passphrase, params, &salt, &bound)?);
    let mut wrapped = [0; WRAPPED_LEN];
    let (body, tag) = wrapped.split_at_mut(32);
    body.copy_from_slice(key.expose());
    // The salt is fresh, hence the key is, hence nonce 0 is used once under it.
    tag.copy_from_slice(&sealer.seal(0, &bound, body));
    Ok(Slot::Passphrase(PassphraseSlot { params, salt, wrapped }))
}

/// Opens `slot` with `passphrase`. Takes the time and memory that the slot names, within the limits of this module.
pub fn unwrap_passphrase(
    slot: &Slot,
    volume: &VolumeId,
    key_id: u32,
    passphrase: &[u8],
) -> Result<VolumeKey, SlotError> {
    let slot = match slot {
        Slot::Passphrase(slot) => slot,
        Slot::Unknown { kind, .. } => return Err(SlotError::UnknownKind(kind.clone())),
    };
    let bound = binding(volume, key_id, slot.params, &slot.salt);
    let sealer = Sealer::new(&stretch(passphrase, slot.params, &slot.salt, &bound)?);
    let mut key = Zeroizing::new([0; 32]);
    let (body, tail) = slot.wrapped.split_at(32);
    key.copy_from_slice(body);
    let mut tag = [0; TAG_LEN];
    tag.copy_from_slice(tail);
    sealer.open(0, &bound, &mut *key, &tag).map_err(|_| SlotError::WrongPassphrase)?;
    Ok(VolumeKey::from_bytes(*key))
}

/// What a slot is bound to: a slot moved to another volume, or with other parameters, does not open.
fn binding(volume: &VolumeId, key_id: u32, params: Argon2Params, salt: &[u8; SALT_LEN]) -> Vec<u8> {
    let mut out = Vec::with_capacity(48);
    out.extend_from_slice(&volume.0);
    for n in [key_id, params.m_cost_kib, params.t_cost, params.p_cost] {
        out.extend_from_slice(&n.to_le_bytes());
    }
    out.extend_from_slice(salt);
    out
}

fn stretch(
    passphrase: &[u8],
    params: Argon2Params,
    salt: &[u8; SALT_LEN],
    bound: &[u8],
) -> Result<DerivedKey, SlotError> {
    if passphrase.is_empty() {
        return Err(SlotError::EmptyPassphrase);
    }
    let checked = params.check()?;
    let mut memory = Vec::new();
    // The untrusted side chooses the size: running out is an error, not an abort.
    memory.try_reserve_exact(checked.block_count()).map_err(|_| SlotError::OutOfMemory(params.m_cost_kib))?;
    memory.resize(checked.block_count(), argon2::Block::new());
    let argon = argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, checked);
    let mut secret = Zeroizing::new([0; 32]);
    let done = argon.hash_password_into_with_memory(passphrase, salt, &mut *secret, &mut memory);
    for block in &mut memory {
        block.as_mut().zeroize();
    }
    done.map_err(|e| SlotError::Parameters(e.to_string()))?;
    Ok(DerivedKey::from_secret(&secret, Purpose::PassphraseSlot, bound))
}

/// A passphrase slot as it stands in volume.json, less its kind.
#[derive(Serialize, Deserialize)]
struct PassphraseWire {
    m_cost_kib: u32,
    t_cost: u32,
    p_cost: u32,
    salt: String,
    wrapped: String,
}

#[derive(Serialize)]
struct Tagged<'a> {
    kind: &'a str,
    #[serde(flatten)]
    slot: PassphraseWire,
}

impl Serialize for Slot {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Slot::Unknown { fields, .. } => fields.serialize(serializer),
            Slot::Passphrase(slot) => Tagged {
                kind: PASSPHRASE_KIND,
                slot: PassphraseWire {
                    m_cost_kib: slot.params.m_cost_kib,
                    t_cost: slot.params.t_cost,
                    p_cost: slot.params.p_cost,
                    salt: hex(&slot.salt),
                    wrapped: hex(&slot.wrapped),
                },
            }
            .serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Slot {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Slot, D::Error> {
        use serde::de::Error;
        let fields = Map::deserialize(deserializer)?;
        let Some(kind) = fields.get("kind").and_then(Value::as_str).map(str::to_owned) else {
            return Err(D::Error::custom("a slot without a kind"));
        };
        if kind != PASSPHRASE_KIND {
            return Ok(Slot::Unknown { kind, fields });
        }
        let wire: PassphraseWire = serde_json::from_value(Value::Object(fields)).map_err(D::Error::custom)?;
        let not_hex =
            |name: &str| D::Error::custom(format!("{name} of a passphrase slot is not hexadecimal"));
        Ok(Slot::Passphrase(PassphraseSlot {
            params: Argon2Params { m_cost_kib: wire.m_cost_kib, t_cost: wire.t_cost, p_cost: wire.p_cost },
            salt: unhex(&wire.salt).ok_or_else(|| not_hex("salt"))?,
            wrapped: unhex(&wire.wrapped).ok_or_else(|| not_hex("wrapped"))?,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Argon2Params = Argon2Params { m_cost_kib: 32, t_cost: 1, p_cost: 1 };
    const VOLUME: VolumeId = VolumeId([5; 16]);

    fn slot() -> PassphraseSlot {
        let key = VolumeKey::from_bytes([9; 32]);
        match wrap_passphrase(&Env::system(), &VOLUME, 1, &key, b"correct horse", FAST).unwrap() {
            Slot::Passphrase(slot) => slot,
            other => panic!("{other:?}"),
        }
    }

    fn open(slot: PassphraseSlot) -> Result<[u8; 32], SlotError> {
        unwrap_passphrase(&Slot::Passphrase(slot), &VOLUME, 1, b"correct horse").map(|k| *k.expose())
    }

    #[test]
    fn only_the_passphrase_opens_and_only_for_its_volume_and_key() {
        let slot = Slot::Passphrase(slot());
        let attempt = |volume, id, phrase: &[u8]| {
            unwrap_passphrase(&slot, &volume, id, phrase).map(|key| *key.expose())
        };
        assert_eq!(attempt(VOLUME, 1, b"correct horse"), Ok([9; 32]));
        assert_eq!(attempt(VOLUME, 1, b"correct horsf"), Err(SlotError::WrongPassphrase));
        assert_eq!(attempt(VOLUME, 2, b"correct horse"), Err(SlotError::WrongPassphrase));
        assert_eq!(attempt(VolumeId([6; 16]), 1, b"correct horse"), Err(SlotError::WrongPassphrase));
        assert_eq!(attempt(VOLUME, 1, b""), Err(SlotError::EmptyPassphrase));
    }

    #[test]
    fn the_wrapped_key_differs_every_time_and_is_not_the_key() {
        let (a, b) = (slot(), slot());
        assert_ne!(a.salt, b.salt);
        assert_ne!(a.wrapped, b.wrapped);
        assert_ne!(a.wrapped[..32], [9; 32]);
    }

    #[test]
    fn an_altered_slot_does_not_open() {
        assert_eq!(open(slot()), Ok([9; 32]));
        for i in 0..WRAPPED_LEN {
            let mut bent = slot();
            bent.wrapped[i] ^= 1;
            assert_eq!(open(bent), Err(SlotError::WrongPassphrase), "byte {i}");
        }
        let mut bent = slot();
        bent.salt[0] ^= 1;
        assert_eq!(open(bent), Err(SlotError::WrongPassphrase));
        let mut bent = slot();
        bent.params.t_cost = 2;
        assert_eq!(open(bent), Err(SlotError::WrongPassphrase));
    }

    #[test]
    fn parameters_beyond_the_limits_are_refused_before_any_work() {
        for params in [
            Argon2Params { m_cost_kib: M_COST_KIB_MAX + 1, ..FAST },
            Argon2Params { t_cost: T_COST_MAX + 1, ..FAST },
            Argon2Params { p_cost: P_COST_MAX + 1, ..FAST },
            Argon2Params { m_cost_kib: 0, ..FAST },
            Argon2Params { t_cost: 0, ..FAST },
            Argon2Params { p_cost: 0, ..FAST },
        ] {
            let bent = PassphraseSlot { params, ..slot() };
            assert!(matches!(open(bent), Err(SlotError::Parameters(_))), "{params:?}");
        }
    }

    #[test]
    fn slots_survive_json_and_an_unknown_kind_is_kept_but_not_used() {
        let known = Slot::Passphrase(slot());
        let text = serde_json::to_string(&known).unwrap();
        assert!(text.starts_with("{\"kind\":\"passphrase-argon2id\""), "{text}");
        assert_eq!(serde_json::from_str::<Slot>(&text).unwrap(), known);

        let text = "{\"ephemeral\":\"00\",\"kind\":\"x25519\",\"n\":3}";
        let unknown: Slot = serde_json::from_str(text).unwrap();
        assert_eq!(unknown.kind(), "x25519");
        assert_eq!(serde_json::to_string(&unknown).unwrap(), text);
        let refused = unwrap_passphrase(&unknown, &VOLUME, 1, b"p");
        assert_eq!(refused.err(), Some(SlotError::UnknownKind("x25519".into())));

        for bad in ["{}", "[]", "{\"kind\":1}", "{\"kind\":\"passphrase-argon2id\"}"] {
            assert!(serde_json::from_str::<Slot>(bad).is_err(), "{bad}");
        }
    }
}
