//! Comparing states of the tree against comparing two maps, and what a comparison reads.

use super::super::diff::{Changed, Diff};
use super::*;

type Model = BTreeMap<Key, Value>;

fn apply(model: &mut Model, changes: &Delta) {
    for (key, value) in changes {
        match value {
            Some(value) => drop(model.insert(key.clone(), value.clone())),
            None => drop(model.remove(key)),
        }
    }
}

/// A state: its pages, what is in memory above them, and what it holds altogether.
#[derive(Clone, Default)]
struct State {
    tree: Tree,
    maps: Vec<Delta>,
    model: Model,
}

impl State {
    fn change(&mut self, changes: Delta) {
        apply(&mut self.model, &changes);
        self.maps.insert(0, changes);
    }

    /// As a checkpoint does: what is in memory becomes pages.
    fn merge(&mut self, pages: &Pages, page_size: usize) {
        for changes in std::mem::take(&mut self.maps).iter().rev() {
            self.tree = pages.merge(&self.tree, changes, page_size).tree;
        }
    }
}

fn expected(old: &Model, new: &Model) -> Vec<Changed> {
    let keys: std::collections::BTreeSet<&Key> = old.keys().chain(new.keys()).collect();
    let changed = |key: &&Key| old.get(*key) != new.get(*key);
    let of = |key: &Key| Changed { key: key.clone(), old: old.get(key).cloned(), new: new.get(key).cloned() };
    keys.into_iter().filter(changed).map(of).collect()
}

/// The differences, and the pages that were looked at.
fn compare(pages: &Pages, old: &State, new: &State, batch: usize) -> (Vec<Changed>, u64) {
    let (old_maps, new_maps): (Vec<&Delta>, Vec<&Delta>) =
        (old.maps.iter().collect(), new.maps.iter().collect());
    let a = Levels { maps: &old_maps, tree: &old.tree, frames: pages };
    let b = Levels { maps: &new_maps, tree: &new.tree, frames: pages };
    let (mut diff, mut found) = (Diff::new(&a, &b), Vec::new());
    pages.fetching(|| {
        loop {
            let batch = diff.next_batch(&a, &b, batch)?;
            if batch.is_empty() {
                return Ok(());
            }
            found.extend(batch);
        }
    });
    (found, diff.pages_read())
}

fn random_changes(rng: &mut Rng, n: usize) -> Delta {
    let change = |rng: &mut Rng| {
        let value = (rng.below(3) > 0).then(|| Value::from(vec![rng.below(4) as u8; 1 + rng.below(60)]));
        (rng.key(), value)
    };
    (0..n).map(|_| change(rng)).collect()
}

#[test]
fn it_finds_what_two_maps_differ_in() {
    let mut differences = 0;
    for seed in 1..200 {
        let mut rng = Rng(seed);
        let pages = Pages { cold: true, ..Pages::default() };
        let page_size = 200 + 100 * rng.below(8);
        let mut states = vec![State::default()];
        for _ in 0..12 {
            let mut next = states.last().expect("one").clone();
            let most = if rng.below(3) == 0 { 400 } else { 12 };
            let n = rng.below(most);
            next.change(random_changes(&mut rng, n));
            if rng.below(3) == 0 {
                next.merge(&pages, page_size);
            }
            states.push(next);
        }
        for _ in 0..12 {
            let [old, new] = [rng.below(states.len()), rng.below(states.len())].map(|i| &states[i]);
            let (found, _) = compare(&pages, old, new, 1 + rng.below(50));
            assert_eq!(found, expected(&old.model, &new.model), "seed {seed}");
            differences += found.len();
        }
    }
    assert!(differences > 10_000, "the states did differ: {differences}");
}

#[test]
fn a_change_among_a_hundred_thousand_files_is_found_with_a_handful_of_pages() {
    let pages = Pages { cold: true, ..Pages::default() };
    let mut old = State::default();
    let file = |i: u64| (key::inode(Ino(i)), Some(Value::from(vec![i as u8; 80])));
    old.change((1..=100_000).map(file).collect());
    old.merge(&pages, 16 << 10);
    let all = pages.walk(&old.tree).len();
    let mut new = old.clone();
    let one = key::inode(Ino(70_000));
    new.change(Delta::from([(one.clone(), Some(Value::from([1].as_slice())))]));
    let in_memory = compare(&pages, &old, &new, 100);
    assert_eq!((in_memory.0.len(), in_memory.1), (1, 0), "nothing but the way to the key");
    new.merge(&pages, 16 << 10);
    let (found, read) = compare(&pages, &old, &new, 100);
    assert_eq!(found.iter().map(|changed| &changed.key).collect::<Vec<_>>(), [&one]);
    assert!(all > 500 && read <= 8, "{read} of {all} pages read");
    assert!(pages.fetches.load(Ordering::Relaxed) <= 8);
    assert_eq!(compare(&pages, &new, &new, 100), (Vec::new(), 0), "a state against itself");
}

#[test]
fn a_page_that_cannot_be_read_is_passed_over_and_the_rest_is_found() {
    let pages = Pages::default();
    let mut new = State::default();
    let file = |i: u64| (key::inode(Ino(i)), Some(Value::from(vec![i as u8; 80])));
    new.change((1..=5_000).map(file).collect());
    new.merge(&pages, 4 << 10);
    let (bad, _) = pages.walk(&new.tree).into_iter().find(|(_, page)| page.level() == 0).expect("a leaf");
    let lost = load(&pages, bad, None).expect("whole").count();
    pages.all.lock().unwrap()[bad.offset as usize] = Bytes::from_static(b"damage");
    let empty = Tree::default();
    let a = Levels { maps: &[], tree: &empty, frames: &pages };
    let b = Levels { maps: &[], tree: &new.tree, frames: &pages };
    let (mut diff, mut found, mut errors) = (Diff::new(&a, &b), 0, 0);
    loop {
        match diff.next_batch(&a, &b, 100) {
            Ok(batch) if batch.is_empty() => break,
            Ok(batch) => found += batch.len(),
            Err(Error::Corrupt { .. }) => {
                errors += 1;
                assert!(diff.skip_damaged(&a, &b));
            }
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!((found, errors), (5_000 - lost, 1));
}
