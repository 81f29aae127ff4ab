//! `godwit controller`: the controllers on a Kubernetes cluster.

use crate::args::Controller;
use crate::{connect, health, shutdown};
use anyhow::Context;
use futures::future::BoxFuture;
use godwit_certificates::schedule::Lifetimes;
use godwit_certificates::signer;
use godwit_control::lease::Candidate;
use godwit_control::{Name, Noun};
use godwit_runtime::Options;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use std::sync::Arc;
use tokio::sync::watch;

/// The container of this process, as it is installed.
const CONTAINER: &str = "virt-controller";

/// Runs until SIGTERM or SIGINT.
pub async fn run(args: Controller) -> anyhow::Result<()> {
    let asked = shutdown::asked()?;
    let client = connect::impatient_client(args.kubeconfig.as_deref()).await?;
    let identity = args.identity.unwrap_or_else(identity);
    let mut options = match &args.bare_api_server {
        Some(folder) => {
            let folder = folder.to_str().context("the data directory's path is not UTF-8")?;
            Options::bare(identity.as_str(), folder)
        }
        None => Options::cluster(identity.as_str()),
    };
    let installation = args.installed.installation();
    let lease_namespace = args.lease_namespace.unwrap_or_else(|| installation.namespace().to_owned());
    options.installation = installation.clone();
    options.lease = Some(Candidate { lease: Name::new(lease_namespace.as_str(), args.lease), holder: identity });
    if let Some(chosen) = args.nouns {
        // What stands for Kubernetes is nobody's choice: nothing runs without it.
        options.nouns.retain(|noun| chosen.contains(noun) || !Noun::CLUSTER.contains(noun));
    }
    options.settings.moves_guests = options.nouns.contains(&Noun::Migration);
    match args.launcher_image {
        Some(image) => options.settings.launcher_image = image,
        None if args.bare_api_server.is_some() => {}
        // Whoever only maintains nodes of another KubeVirt makes no pods.
        None if !options.nouns.contains(&Noun::Vmi) => {}
        None => options.settings.launcher_image = own_image(&client, &lease_namespace).await?,
    }
    options.settings.launcher_pull_policy = args.launcher_pull_policy;
    let (listed, ready) = watch::channel(false);
    options.listed = Some(listed);
    if let Some(address) = args.health {
        let (scraper, scrapes) = godwit_runtime::scraping();
        options.scrapes = Some(scrapes);
        let told = move || -> BoxFuture<'static, _> {
            let scraper = scraper.clone();
            Box::pin(async move { scraper.figures().await })
        };
        health::serve(address, ready, Arc::new(told)).await?;
    }
    let lifetimes = Lifetimes { certificate: args.certificate_lifetime, ..Lifetimes::default() };
    // Whoever only maintains nodes of another KubeVirt has no handlers.
    let signs = options.nouns.contains(&Noun::Migration);
    let signer = signer::run(client.clone(), installation, lifetimes);
    tokio::select! {
        ended = godwit_runtime::run(client, options, asked) => Ok(ended?),
        () = signer, if signs => anyhow::bail!("the signer of nodes' certificates has ended"),
    }
}

/// A name that no other running process has.
fn identity() -> String {
    let host = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{host}_{}", std::process::id())
}

/// The image of the pod that this process runs in: one image has all of godwit in it.
async fn own_image(client: &Client, namespace: &str) -> anyhow::Result<String> {
    let name = std::env::var("POD_NAME").context("no --launcher-image, and no POD_NAME that says which pod this is")?;
    let pod = Api::<Pod>::namespaced(client.clone(), namespace).get(&name).await;
    let pod = pod.with_context(|| format!("read the own pod {namespace}/{name}; or give --launcher-image"))?;
    image(pod).with_context(|| {
        format!("pod {namespace}/{name} has no container {CONTAINER}, and not just one other: give --launcher-image")
    })
}

/// Others may stand before the controllers' container: service meshes and policies put theirs into pods.
fn image(pod: Pod) -> Option<String> {
    let containers = pod.spec.map(|spec| spec.containers).unwrap_or_default();
    let own = containers.iter().find(|one| one.name == CONTAINER).or(match containers.as_slice() {
        [only] => Some(only),
        _ => None,
    });
    own.and_then(|own| own.image.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_are_of_the_controllers_image() {
        let of = |containers: &[&str]| {
            let named: Vec<_> =
                containers.iter().map(|name| serde_json::json!({"name": name, "image": format!("{name}:1")})).collect();
            image(serde_json::from_value(serde_json::json!({"spec": {"containers": named}})).expect("a pod"))
        };
        assert_eq!(of(&["proxy", "virt-controller"]).as_deref(), Some("virt-controller:1"));
        assert_eq!(of(&["mine"]).as_deref(), Some("mine:1"));
        assert_eq!(of(&["proxy", "mine"]), None);
    }
}
