//! The runtime that a volume's requests to the store run on.
//! Invariant: a wait for it ends also where nobody else drives it.

use std::future::Future;
use std::sync::Arc;
use tokio::runtime::{Handle, Runtime};
use tokio::task::JoinHandle;

/// See the module.
#[derive(Clone)]
pub struct Io {
    handle: Handle,
    /// A runtime without threads runs only while somebody waits for it.
    driven: Option<Arc<Runtime>>,
}

impl Io {
    /// A runtime with threads of its own, which somebody else keeps.
    pub fn on(handle: &Handle) -> Io {
        Io { handle: handle.clone(), driven: None }
    }

    /// A runtime that runs while a call waits, for simulations.
    pub fn driven(runtime: Arc<Runtime>) -> Io {
        Io { handle: runtime.handle().clone(), driven: Some(runtime) }
    }

    /// For what only spawns.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits for `future`. Not to be called on the runtime.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        match &self.driven {
            Some(runtime) => runtime.block_on(future),
            None => self.handle.block_on(future),
        }
    }

    /// Starts a task.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
        self.handle.spawn(task)
    }
}
