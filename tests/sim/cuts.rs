//! Power cuts around the end of a segment, one upon the other: many more of them than a run meets.
//! Invariant: what was synced is there, however often the power goes while the log is being mended.

use super::common::World;
use super::disk::SimDisk;
use super::forge;
use embassyfs::log::chain::ChainStart;
use embassyfs::log::recovery::{Role, Step, recover};
use embassyfs::log::segment::VolumeContext;
use embassyfs::log::statedir::StateDir;
use embassyfs::log::writer::LogWriter;
use embassyfs::log::{Append, Result};
use embassyfs::types::{CommitNo, Epoch, FrameKind, Seq, Timestamp};
use std::sync::Arc;

const SEEDS: u64 = 1500;
/// Commits that are synced, each by itself, so that zeros are laid out behind the segment.
const SYNCED: u64 = 4;

fn time(no: u64) -> Timestamp {
    Timestamp { secs: no.cast_signed(), nanos: 0 }
}

/// Appends commits and closes the segment while the power goes, or just before.
fn write(world: &World, ctx: &Arc<VolumeContext>, disk: &SimDisk) -> Result<()> {
    let dir = Arc::new(StateDir::open_on(Arc::new(disk.clone()), world.dir.path())?);
    let mut writer = LogWriter::new(dir, ctx.clone(), world.env(), Epoch(1), None, Seq(1), CommitNo(0));
    for no in 1..=SYNCED + 2 {
        let mut data = vec![0; 1 + world.chance.below(700) as usize];
        world.env().random.fill(&mut data);
        writer.append(FrameKind::Data, &data)?;
        writer.append_commit(CommitNo(no), time(no), &[data])?;
        if no <= SYNCED {
            writer.sync()?;
        }
    }
    disk.cut_within(4);
    writer.close().map(|_| ())
}

/// The newest commit, as a writer finds it who opens the log.
fn newest(world: &World, ctx: &Arc<VolumeContext>, disk: &SimDisk) -> Result<CommitNo> {
    let dir = StateDir::open_on(Arc::new(disk.clone()), world.dir.path())?;
    let (env, mut apply) = (world.env(), |_, _, _, _: &[bytes::Bytes]| Ok(Step::Continue));
    let recovered = recover(ctx, &dir, &env, None, ChainStart::default(), Role::Writer, &mut apply);
    Ok(world.runtime.block_on(recovered)?.last_commit)
}

#[test]
fn the_power_may_go_again_while_the_end_of_the_log_is_mended() {
    let ctx = Arc::new(forge::volume());
    for seed in 0..SEEDS {
        let world = World::new(seed, embassyfs::log::volume::Parameters::default(), time(0));
        let mut disk = SimDisk::new(world.dir.path(), &world).without_rests();
        let _ = write(&world, &ctx, &disk); // the power may go in the middle of it
        disk.cut_now();
        for cuts in (0..4).rev() {
            disk = disk.after();
            if cuts > 0 {
                disk.cut_within(10);
            }
            match newest(&world, &ctx, &disk) {
                Ok(newest) => assert!((SYNCED..=SYNCED + 2).contains(&newest.0), "seed {seed}: {newest:?}"),
                Err(error) => assert!(disk.is_down(), "seed {seed}, {cuts} cuts to come: {error}"),
            }
            disk.cut_now();
        }
    }
}
