//! The shell around control: informers, queues, effects, leases, events over kube::Client
