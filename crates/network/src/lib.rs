//! Links, namespaces, taps and address translation over netlink; knows no Kubernetes
