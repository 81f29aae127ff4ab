# One image for all of godwit: the components and the launchers. Everything in it, and what builds it, is of Debian 13's packages.
#   docker build -t registry.example.com/godwit:v0.1.0 . && docker push registry.example.com/godwit:v0.1.0
FROM docker.io/library/debian:trixie-slim AS build
# rustc-web: the Rust that Debian's browsers are built with; the one named rustc is too old. binutils come with gcc.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates cargo-web gcc libc6-dev make rustc-web
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p godwit

FROM docker.io/library/debian:trixie-slim
# qemu-system-x86, qemu-utils: guests and their disks. swtpm: their TPMs. ovmf: EFI. nftables: address translation, by the handler.
RUN apt-get update \
 && apt-get install -y --no-install-recommends nftables ovmf qemu-system-x86 qemu-utils swtpm \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/godwit /usr/bin/godwit
# Nobody in particular. Only the handler is root, as its DaemonSet says.
USER 65532:65532
ENTRYPOINT ["/usr/bin/godwit"]
