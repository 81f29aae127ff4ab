//! What to do: every controller's decisions as pure functions
