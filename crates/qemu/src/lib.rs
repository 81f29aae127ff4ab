//! The hypervisor: command line, QMP and one migration as one QEMU sees it; knows no Kubernetes
