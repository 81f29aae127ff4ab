//! What can happen.

use godwit_control::{Kind, Name, Object, Ref};
use serde_json::Value;

use crate::control_loop::Life;

/// One piece of news of a watch.
#[derive(Clone, Debug)]
pub enum News {
    /// The object exists in this state.
    Here(Object),
    /// The object is gone; its last state.
    Gone(Object),
}

/// A write of a node's agent.
#[derive(Clone, Debug)]
pub struct NodeWrite {
    /// To what.
    pub target: Ref,
    /// It must still be this one.
    pub uid: String,
    /// The merge patch; `None` deletes with grace 0.
    pub patch: Option<Value>,
    /// Through the status subresource.
    pub status: bool,
}

/// An event. `life` is that of a controller process, `epoch` that of a node's agent, `boot` that of a node: what was
/// meant for an earlier life does not arrive.
#[derive(Clone, Debug)]
pub enum Event {
    /// News for the controllers.
    News { life: Life, kind: Kind, news: News },
    /// A broken watch is taken up again with a list.
    Relist { life: Life, kind: Kind },
    /// A page of the list arrives.
    Listed { life: Life, kind: Kind, objects: Vec<Object>, first: bool, last: bool },
    /// A wake-up that a decision asked for.
    Wake { life: Life },
    /// The next write of a plan.
    Effect { life: Life, chain: u64 },
    /// A plan has been carried out, or could not be.
    Conclude { life: Life, chain: u64 },
    /// The controllers start.
    ControllersStart { life: Life },
    /// News for a node.
    NodeNews { node: usize, epoch: u64, target: Ref, object: Option<Object> },
    /// A node's agent starts or reaches the API again, and lists.
    AgentLists { node: usize, epoch: u64 },
    /// The handler looks at a VMI.
    Look { node: usize, epoch: u64, vmi: Name },
    /// The kubelet looks at a pod.
    Sync { node: usize, epoch: u64, pod: Name },
    /// A node's write reaches the API.
    Write { node: usize, epoch: u64, write: NodeWrite },
    /// A pod's image is there.
    Pulled { node: usize, boot: u64, pod: Name, uid: String },
    /// A guest has booted.
    Booted { launcher: u64 },
    /// A target's QEMU waits for the guest.
    Prepared { launcher: u64, uid: String },
    /// An outgoing migration takes its next step.
    Transfer { launcher: u64, token: u64 },
    /// An outgoing migration whose link is cut breaks off.
    Broken { launcher: u64, token: u64 },
    /// The go arrives at the target's handler.
    Go { uid: String, source: u64, epoch: u64, target_node: usize },
    /// The answer to it arrives at the source's handler.
    GoAnswered { uid: String, node: usize, epoch: u64, from: usize, answer: Answer },
    /// A launcher that was told to has ended.
    Ended { launcher: u64 },
    /// An order reaches a launcher that stood still.
    Order { launcher: u64, order: Order },
    /// Something that stood still goes on: a node's agent (by the node's number) or a launcher or its QEMU (by the launcher's).
    GoesOn { still: Still, id: u64 },
    /// A node says that it lives.
    Heartbeat { node: usize, boot: u64 },
    /// A node's handler renews its lease.
    Renew { node: usize, boot: u64 },
    /// The time until which a node's guests may run may have come.
    FenceEnds { node: usize, boot: u64 },
    /// A VM has to run again after the death of its node, unless there have been more disturbances than these.
    Rescued { vmi: Name, disturbances: u64 },
    /// A node hears the API server again.
    NodeHears { node: usize },
    /// Owned objects of what is gone are deleted.
    Collect { owner: String },
    /// A user asks for a migration.
    AskMigration { vmi: Name },
    /// A user deletes a migration.
    CancelMigration { name: Name },
    /// Something goes wrong, and then again later.
    Fault(Fault),
    /// A blow lands on a migration.
    Strike { uid: String, vmi: Name, blow: crate::Blow },
    /// A node that died boots.
    Boot { node: usize },
    /// A node that was cut off is reached again.
    NodeHeals { node: usize },
    /// A cordoned node takes pods again.
    Uncordon { node: usize },
    /// A cut link works again.
    LinkHeals { link: (usize, usize) },
    /// The API server is back.
    StoreUp,
    /// An administrator empties a node.
    Empty { node: usize },
    /// An administrator puts a node into maintenance.
    Maintain { number: u32 },
    /// An administrator deletes a maintenance.
    EndMaintenance { target: Ref },
    /// An administrator cordons a node and leaves it so.
    CordonForGood { node: usize },
    /// Users and faults stop.
    Calm,
    /// Whether everything is at rest.
    AtRest,
}

/// What a handler orders a launcher to do.
#[derive(Clone, Debug)]
pub enum Order {
    /// Send the guest of this migration to that launcher.
    Send { uid: String, target: u64 },
    /// Do not.
    Cancel { uid: String, why: Option<&'static str> },
    /// Switch to post-copy.
    PostCopy { uid: String },
}

/// What can stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Still {
    /// A node's agent: its handler and kubelet.
    Agent,
    /// A launcher's process.
    Launcher,
    /// A launcher's QEMU.
    Qemu,
}

/// What the target says to the go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The guest runs here.
    Running,
    /// The guest is lost.
    Lost,
}

/// Faults that come at times of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A watch of the controllers breaks.
    WatchBreak,
    /// A controller process restarts.
    ControllerRestart,
    /// A controller process stands still for a while.
    ControllerStall,
    /// The API server restarts.
    StoreRestart,
    /// An administrator changes the limits.
    LimitChange,
    /// A node's agent restarts.
    AgentRestart,
    /// A launcher is killed.
    LauncherKill,
    /// A node dies.
    NodeDeath,
    /// A node is cut off.
    NodeCut,
    /// A node reaches other nodes, but not the API server.
    ApiCut,
    /// A link is cut.
    LinkCut,
    /// A node is cordoned for a while.
    Cordon,
    /// A node's agent stands still for a while.
    AgentStall,
    /// A launcher stands still for a while.
    LauncherStall,
    /// A QEMU stands still for a while.
    QemuStall,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 15] = [
        Fault::WatchBreak,
        Fault::ControllerRestart,
        Fault::ControllerStall,
        Fault::StoreRestart,
        Fault::LimitChange,
        Fault::AgentRestart,
        Fault::LauncherKill,
        Fault::NodeDeath,
        Fault::NodeCut,
        Fault::ApiCut,
        Fault::LinkCut,
        Fault::Cordon,
        Fault::AgentStall,
        Fault::LauncherStall,
        Fault::QemuStall,
    ];
}
