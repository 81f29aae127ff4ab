//! What works beside a KubeVirt that somebody else has installed, and takes nothing from it.

use godwit_api::access;
use serde_json::{Value, json};

use crate::{Component, Error, Options, Part, definitions, monitoring, service_account, workloads};

/// The parts for these components.
pub fn parts(options: &Options) -> Result<Vec<Part>, Error> {
    let mut components = options.components.clone();
    components.sort_unstable();
    components.dedup();
    let runs = components.contains(&Component::Maintenance);
    let mut parts: Vec<Part> =
        components.into_iter().map(|component| part(component, options)).collect::<Result<_, _>>()?;
    if let Some(prometheus) = &options.monitoring {
        if !runs {
            return Err(Error::Missing(
                "monitoring",
                "nothing of these components runs in the cluster and could be watched; leave --monitoring out",
            ));
        }
        parts.push(monitoring(monitoring::maintenance(&options.namespace, prometheus)));
    }
    Ok(parts)
}

fn part(component: Component, options: &Options) -> Result<Part, Error> {
    match component {
        Component::Plan => {
            let mut objects = access::roles(access::PLANNER, &access::planner(), &options.kubevirt);
            for object in &mut objects {
                object["metadata"]["labels"] = json!({"app.kubernetes.io/part-of": "godwit"});
            }
            let title = "What `godwit plan drain` reads, to be bound to whoever calls it. It runs nowhere but where it is called.";
            Ok(Part { name: "plan", title, objects })
        }
        Component::Maintenance => {
            let own = &options.namespace;
            let account = access::maintainer();
            let kinds = definitions().into_iter().filter(|crd| crd["spec"]["names"]["kind"] == "NodeMaintenance");
            let mut objects: Vec<Value> = kinds.collect();
            if *own != options.kubevirt {
                objects.push(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": own}}));
            }
            objects.push(service_account(account.name, own));
            objects.extend(account.objects(own));
            objects.extend(workloads::maintenance(options));
            let title = "NodeMaintenance: closes nodes and evicts what is on them; the KubeVirt that is there moves the guests.";
            Ok(Part { name: "maintenance", title, objects })
        }
        Component::NodePool => Err(Error::Missing("nodepool", "node pools are not built yet")),
    }
}
