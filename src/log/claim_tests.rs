//! Tests of claims, strays and barriers: what of the store is the chain, and who may continue it.

use super::*;

/// Segments of one commit each, up to `last`; the store is known to hold those up to `stored`.
fn singles(last: u64, stored: u64) -> Host {
    let home = host();
    let mut writer = home.writer(1, &fresh());
    for no in 1..=last {
        writer.set_stored(Seq(stored.min(no - 1)));
        commit(&mut writer, no, 10);
        writer.close().unwrap();
    }
    home
}

fn end_of_store(store: &MemoryStore) -> Result<crate::log::chain::Walk> {
    let (ctx, start) = (volume(), ChainStart::default());
    block_on(crate::log::chain::end_in_store(&ctx, store, &start))
}

fn marked(kind: Kind, seq: u64, walk: &crate::log::chain::Walk) -> (Vec<u8>, Head) {
    use crate::log::claim::{About, Mark, Put};
    let about = if kind == Kind::Claim { About::Claim } else { About::Barrier };
    let mark = Mark { about, time: time(1), host: "abroad".into(), text: "a test".into() };
    let (epoch, prev, last_commit) = (Epoch(walk.epoch.0 + 1), walk.head, walk.last_commit);
    let put = Put { kind, seq: Seq(seq), epoch, prev, last_commit, mark: &mark };
    put.bytes(&volume(), &env(seq << 8)).unwrap()
}

fn put(store: &MemoryStore, seq: u64, bytes: Vec<u8>) {
    let before = store.objects.lock().insert(segment_name(Seq(seq)), bytes.into());
    assert!(before.is_none(), "{seq} was there");
}

fn abroad(store: &MemoryStore) -> Result<Vec<u64>> {
    let (_, commits) = host().recover(Some(store), ChainStart::default(), Role::Reader)?;
    let seen: Vec<u64> = commits.into_iter().map(|(no, _)| no).collect();
    let listed = block_on(list_commits(&volume(), store))?;
    assert_eq!(listed.iter().map(|commit| commit.no.0).collect::<Vec<_>>(), seen);
    Ok(seen)
}

#[test]
fn what_an_overtaken_writer_left_in_the_store_is_not_part_of_the_chain() {
    let home = singles(6, 2);
    // Home had 3 to 6 on their way; 4 is not there when the claim comes, and then 5 and 6 are strays.
    let store = store_of(&home);
    store.objects.lock().remove(&segment_name(Seq(4)));
    let walk = end_of_store(&store).unwrap();
    assert_eq!((walk.place, walk.last_commit), (Seq(4), CommitNo(3)));
    let (bytes, claim) = marked(Kind::Claim, 4, &walk);
    put(&store, 4, bytes.clone());
    assert_eq!(abroad(&store).unwrap(), [1, 2, 3], "the newest in the list are strays");
    let after = end_of_store(&store).unwrap();
    assert_eq!((after.head, after.place, after.epoch), (Some(claim), Seq(4 + 1024), Epoch(2)));
    // The new writer goes on, from its own state directory, and home is refused.
    let new = host();
    new.write(4, &bytes);
    let (at, _) = new.recover(Some(&*store), ChainStart::default(), Role::Writer).unwrap();
    assert_eq!((at.next_seq, at.epoch), (Seq(1028), Epoch(2)));
    let mut writer = new.writer(8, &at);
    for no in 4..=5 {
        writer.append_commit(CommitNo(no), time(no), &parts(no)).unwrap();
        writer.close().unwrap().unwrap();
    }
    new.upload(&store);
    assert_eq!(abroad(&store).unwrap(), [1, 2, 3, 4, 5]);
    assert_eq!(end_of_store(&store).unwrap().place, Seq(1030));
    refused(home.recover(Some(&*store), ChainStart::default(), Role::Writer), &["promote"]);
    let (again, _) = new.recover(Some(&*store), ChainStart::default(), Role::Writer).unwrap();
    assert_eq!(again.next_seq, Seq(1030));
    // What the new writer had stored is damage when it is gone, and so is the claim.
    for lost in [4, 1028] {
        let object = store.objects.lock().remove(&segment_name(Seq(lost))).unwrap();
        corrupt(host().recover(Some(&*store), ChainStart::default(), Role::Reader), "missing");
        assert!(end_of_store(&store).is_err());
        store.objects.lock().insert(segment_name(Seq(lost)), object);
    }
}

#[test]
fn a_home_that_was_overtaken_is_refused_also_when_its_own_strays_are_the_newest_in_the_store() {
    let home = singles(6, 2);
    let store = store_of(&home);
    store.objects.lock().remove(&segment_name(Seq(4)));
    let (bytes, _) = marked(Kind::Claim, 4, &end_of_store(&store).unwrap());
    put(&store, 4, bytes);
    refused(home.recover(Some(&*store), ChainStart::default(), Role::Writer), &["promote"]);
}

#[test]
fn a_barrier_is_no_part_of_the_chain_and_not_its_end_and_no_gap() {
    let home = singles(6, 5);
    let store = store_of(&home);
    let walk = end_of_store(&store).unwrap();
    let (bytes, _) = marked(Kind::Barrier, 20, &walk);
    put(&store, 20, bytes);
    assert_eq!(abroad(&store).unwrap(), [1, 2, 3, 4, 5, 6]);
    let same = end_of_store(&store).unwrap();
    assert_eq!((same.head, same.place, same.barred), (walk.head, Seq(7), false));
    // A gap behind it is still one.
    let object = store.objects.lock().remove(&segment_name(Seq(3))).unwrap();
    corrupt(host().recover(Some(&*store), ChainStart::default(), Role::Reader), "missing");
    store.objects.lock().insert(segment_name(Seq(3)), object);
    // In the place of the next segment it moves that place; the claim is found behind it.
    let (bytes, _) = marked(Kind::Barrier, 7, &walk);
    put(&store, 7, bytes);
    let barred = end_of_store(&store).unwrap();
    assert_eq!((barred.head, barred.place, barred.barred), (walk.head, Seq(7 + 1024), true));
    assert_eq!(abroad(&store).unwrap(), [1, 2, 3, 4, 5, 6]);
    refused(home.recover(Some(&*store), ChainStart::default(), Role::Writer), &["promote"]);
    let (bytes, claim) = marked(Kind::Claim, 7 + 1024, &barred);
    put(&store, 7 + 1024, bytes);
    let end = end_of_store(&store).unwrap();
    assert_eq!((end.head, end.place, end.barred), (Some(claim), Seq(7 + 2048), false));
    assert_eq!(abroad(&store).unwrap(), [1, 2, 3, 4, 5, 6]);
    // Without the barrier the claim lies in no place.
    store.objects.lock().remove(&segment_name(Seq(7)));
    corrupt(host().recover(Some(&*store), ChainStart::default(), Role::Reader), "missing");
}
