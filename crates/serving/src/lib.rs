//! How requests to a Kubernetes API are read and answered, over HTTP and TLS: what the embedded API server and `godwit api`
//! share. What the answers are is theirs.

pub mod actions;
pub mod listen;
pub mod pem;
pub mod request;
pub mod respond;
pub mod stream;
pub mod user;
