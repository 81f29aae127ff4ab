//! The front door: TLS, authn, authz, admission, generic REST and watch streams
