//! What is said: kubevirt.io types, CRDs, defaults, validation (pure)
