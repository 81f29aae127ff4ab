//! The arrows of the house: who may depend on whom. A new arrow is a decision, so it fails here until it is written down.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// The allowed arrows, crate → what it may use (docs/architecture.md). Only `godwit` may use everything.
const ARROWS: &[(&str, &[&str])] = &[
    ("api", &[]),
    ("machinery", &["api"]),
    ("forecast", &[]),
    ("control", &["api", "forecast", "machinery"]),
    ("runtime", &["api", "machinery", "control"]),
    ("qemu", &["forecast"]),
    ("guest-rom", &[]),
    ("guest-init", &[]),
    ("network", &[]),
    ("images", &[]),
    ("store", &[]),
    ("serving", &["machinery"]),
    ("apiserver", &["machinery", "serving", "store"]),
    ("launcher", &["api", "qemu", "guest-rom"]),
    ("devices", &[]),
    ("handler", &["api", "devices", "launcher", "network"]),
    ("kubelet", &["images", "network"]),
    ("standalone", &["api", "images", "network", "qemu"]),
    ("webhook", &["api", "serving"]),
    ("subresources", &["api", "handler", "machinery", "serving", "webhook"]),
    ("certificates", &["api"]),
    ("drain", &["api", "control"]),
    ("manifests", &["api"]),
    ("simulator", &["api", "machinery", "control"]),
    (
        "bench",
        &[
            "api",
            "drain",
            "guest-init",
            "guest-rom",
            "images",
            "launcher",
            "network",
            "qemu",
            "simulator",
            "standalone",
        ],
    ),
];

/// Dependencies for tests only.
const TEST_ARROWS: &[(&str, &[&str])] =
    &[("qemu", &["guest-rom"]), ("handler", &["guest-rom"]), ("certificates", &["apiserver", "serving", "store"])];

const PURE: &[&str] = &["api", "machinery", "forecast", "control", "manifests"];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo metadata starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

#[test]
fn no_new_arrows_between_crates() {
    let allowed: BTreeMap<&str, BTreeSet<&str>> =
        ARROWS.iter().map(|(from, to)| (*from, to.iter().copied().collect())).collect();
    let tests: BTreeMap<&str, BTreeSet<&str>> =
        TEST_ARROWS.iter().map(|(from, to)| (*from, to.iter().copied().collect())).collect();
    let mut wrong = Vec::new();
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("name");
        let Some(name) = name.strip_prefix("godwit-") else { continue };
        let Some(may) = allowed.get(name) else {
            wrong.push(format!("crate {name} is not in the table"));
            continue;
        };
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let Some(to) = dependency["name"].as_str().and_then(|n| n.strip_prefix("godwit-")) else { continue };
            let for_tests = dependency["kind"] == "dev" && tests.get(name).is_some_and(|t| t.contains(to));
            if !may.contains(to) && !for_tests {
                wrong.push(format!("{name} → {to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "arrows that nobody decided: {wrong:#?}");
}

#[test]
fn pure_crates_hold_no_async_and_no_io_crates() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("crates folder").to_owned();
    let mut wrong = Vec::new();
    for name in PURE {
        let manifest = std::fs::read_to_string(root.join(name).join("Cargo.toml")).expect("manifest");
        for forbidden in ["tokio", "kube", "hyper", "axum", "rand", "nix", "rustix", "uuid"] {
            let normal = manifest.split("[dev-dependencies]").next().unwrap_or_default();
            if normal
                .lines()
                .any(|line| line.starts_with(&format!("{forbidden}.")) || line.starts_with(&format!("{forbidden} ")))
            {
                wrong.push(format!("{name} depends on {forbidden}"));
            }
        }
        let mut folders = vec![root.join(name).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).expect("folder").flatten() {
                let path = entry.path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "rs") {
                    let text = std::fs::read_to_string(&path).expect("source");
                    for (number, line) in text.lines().enumerate() {
                        let code = line.split("//").next().unwrap_or_default();
                        if code.contains("async fn") || code.contains("async move") || code.contains(".await") {
                            wrong.push(format!("{}:{}: async in a pure crate", path.display(), number + 1));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
