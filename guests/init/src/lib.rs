//! What the demo guest writes to its disks, so that who looks at an image from outside knows it as well.

pub mod blocks;
