//! Pods here: runs pods as processes in network namespaces
