//! How often what goes wrong.

macro_rules! faults {
    ($($(#[doc = $doc:literal])* $field:ident $name:literal $often:literal,)*) => {
        /// How often things go wrong: of a thousand (`*_per_mille`), or so many times in an hour of virtual time (`*_per_hour`).
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Faults {
            $($(#[doc = $doc])* pub $field: u32,)*
        }

        impl Faults {
            /// Nothing goes wrong.
            pub const NONE: Faults = Faults { $($field: 0,)* };

            /// Everything goes wrong, often.
            pub const ALL: Faults = Faults { $($field: $often,)* };

            /// The names of all faults, as `godwit simulate --faults` takes them.
            pub const NAMES: &'static [&'static str] = &[$($name),*];

            /// Whether the fault of this name is a share of what is done, instead of coming so many times in an hour.
            pub fn is_share(name: &str) -> bool {
                match name { $($name => stringify!($field).ends_with("_per_mille"),)* _ => false }
            }

            /// How often the fault of this name is to happen.
            pub fn rate(&mut self, name: &str) -> Option<&mut u32> {
                match name { $($name => Some(&mut self.$field),)* _ => None }
            }
        }
    };
}

faults! {
    /// Watch events that come up to seconds late.
    late_news_per_mille "late-news" 50,
    /// Watch events that come twice.
    double_news_per_mille "double-news" 30,
    /// Watches that break (the connection, or 410): what happens is missed until the kind is listed again.
    watch_breaks_per_hour "watch-breaks" 120,
    /// Lists whose revision expires between two pages (410), and begin again.
    expired_lists_per_mille "expired-lists" 200,
    /// Writes of controllers that are refused although nobody else has written.
    conflicts_per_mille "conflicts" 30,
    /// Writes of controllers that are carried out, but whose answer is lost.
    lost_answers_per_mille "lost-answers" 15,
    /// A controller restarts; what it was carrying out is cut off between two writes.
    controller_restarts_per_hour "controller-restarts" 60,
    /// A controller stands still between two writes of a plan and goes on with it seconds later, when another one leads.
    controller_stalls_per_hour "controller-stalls" 60,
    /// The API server restarts; everything that was written is there again.
    store_restarts_per_hour "store-restarts" 20,
    /// The handler and kubelet of a node restart; launchers live on.
    agent_restarts_per_hour "agent-restarts" 60,
    /// A launcher is killed with its QEMU.
    launcher_kills_per_hour "launcher-kills" 40,
    /// A node dies and comes back, empty, minutes later.
    node_deaths_per_hour "node-deaths" 15,
    /// A node cannot reach anything for a while; its guests run on.
    node_cuts_per_hour "node-cuts" 20,
    /// A node reaches the other nodes, but not the API server, for a while.
    api_cuts_per_hour "api-cuts" 20,
    /// The link between two nodes is cut for a while.
    link_cuts_per_hour "link-cuts" 60,
    /// A node's handler and kubelet stand still (SIGSTOP) and go on up to a minute later, as if nothing had been.
    handler_stalls_per_hour "handler-stalls" 40,
    /// A launcher does, without its QEMU.
    launcher_stalls_per_hour "launcher-stalls" 40,
    /// A QEMU does, without its launcher.
    qemu_stalls_per_hour "qemu-stalls" 40,
    /// Clusters that allow post-copy, after a second or two.
    post_copy_per_mille "post-copy" 300,
    /// Migrations at whose hand-over, within milliseconds around the go, something breaks.
    hand_over_per_mille "hand-over" 150,
    /// Nodes that are cordoned for some minutes.
    cordons_per_hour "cordons" 30,
    /// The limits in the KubeVirt object are changed.
    limit_changes_per_hour "limit-changes" 30,
    /// Images that are pulled slowly (up to minutes).
    slow_pulls_per_mille "slow-pulls" 100,
    /// Migrations that are deleted at some moment of their life, or their VMI.
    cancels_per_mille "cancels" 250,
    /// Migrations that are asked for twice at the same moment, past admission.
    twins_per_mille "twins" 100,
    /// Guests that write faster than the link carries.
    busy_guests_per_mille "busy-guests" 150,
    /// Clocks of nodes and controllers that are off, by up to half a minute.
    skewed_clocks_per_mille "skewed-clocks" 300,
}
