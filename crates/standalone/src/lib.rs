//! The one-machine cluster: fabric, certificates, processes, demo
