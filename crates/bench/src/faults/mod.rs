//! `godwit bench faults`: guests are moved to and fro while the processes and links that move them are killed, stopped and cut,
//! and a witness outside says whether a guest ever ran twice, or not at all without need.

mod error;
mod guest;
mod judge;
mod night;
mod plan;
mod report;
mod run;
mod sight;
mod stage;
mod strike;

pub use error::Error;
pub use night::{Options, Summary, night};
