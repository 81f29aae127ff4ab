//! OCI images: a local store, building, importing and pulling
