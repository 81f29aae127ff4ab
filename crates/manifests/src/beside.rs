//! What works beside a KubeVirt that somebody else has installed, and takes nothing from it.

use godwit_api::access;
use serde_json::json;

use crate::{Component, Error, Options, Part};

/// The parts for these components.
pub fn parts(options: &Options) -> Result<Vec<Part>, Error> {
    let mut components = options.components.clone();
    components.sort_unstable();
    components.dedup();
    components.into_iter().map(|component| part(component, options)).collect()
}

fn part(component: Component, options: &Options) -> Result<Part, Error> {
    match component {
        Component::Plan => {
            let mut objects = access::roles(access::PLANNER, &access::planner(), &options.namespace);
            for object in &mut objects {
                object["metadata"]["labels"] = json!({"app.kubernetes.io/part-of": "godwit"});
            }
            let title = "What `godwit plan drain` reads, to be bound to whoever calls it. It runs nowhere but where it is called.";
            Ok(Part { name: "plan", title, objects })
        }
        Component::Maintenance => {
            Err(Error::Missing("maintenance", "what is to be installed for it beside KubeVirt is not built yet"))
        }
        Component::NodePool => Err(Error::Missing("nodepool", "node pools are not built yet")),
    }
}
