//! A container's environment: values, and references to the pod, config maps and secrets.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, ObjectFieldSelector, Pod, Secret};
use kube::{Api, Client, ResourceExt};

use crate::quantity;

/// Variables that name programs to godwit: whoever sets them for a node means its launchers, too.
const PROGRAMS: [&str; 3] = ["GODWIT_QEMU", "GODWIT_QEMU_IMG", "GODWIT_SWTPM"];

/// What the node's own system, as an image, has in its environment, as `name=value`, out of that of the kubelet.
pub(crate) fn of_host(own: impl Iterator<Item = (OsString, OsString)>) -> Vec<String> {
    own.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| PROGRAMS.contains(&name.as_str()))
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
}

/// What the pod's fields are resolved with besides the pod.
pub(crate) struct Facts {
    pub(crate) node_name: String,
    pub(crate) node_ip: IpAddr,
    pub(crate) pod_ip: IpAddr,
}

/// The environment in the order of Kubernetes: `envFrom` first, then `env`, with `$(NAME)` replaced by what came before.
pub(crate) async fn resolve(
    client: &Client,
    pod: &Pod,
    container: &Container,
    image: &[String],
    facts: &Facts,
) -> Result<Vec<(String, String)>, String> {
    let mut env: Vec<(String, String)> = Vec::new();
    for pair in image {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        put(&mut env, name, value.to_owned());
    }
    let namespace = pod.namespace().unwrap_or_default();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let mut values = BTreeMap::new();
        if let Some(wanted) = &source.config_map_ref {
            values = config_map(client, &namespace, &wanted.name, wanted.optional.unwrap_or(false)).await?;
        } else if let Some(wanted) = &source.secret_ref {
            values = secret(client, &namespace, &wanted.name, wanted.optional.unwrap_or(false)).await?;
        }
        for (key, value) in values {
            if let Ok(value) = String::from_utf8(value) {
                put(&mut env, &format!("{prefix}{key}"), value);
            }
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (_, Some(source)) => match from(client, pod, container, source, facts).await? {
                Some(value) => value,
                None => continue,
            },
            (Some(value), None) => expand(value, &env),
            (None, None) => String::new(),
        };
        put(&mut env, &variable.name, value);
    }
    Ok(env)
}

fn put(env: &mut Vec<(String, String)>, name: &str, value: String) {
    if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
        return; // cannot be in an environment; the API server refuses such names
    }
    match env.iter_mut().find(|(known, _)| known == name) {
        Some(entry) => entry.1 = value,
        None => env.push((name.into(), value)),
    }
}

/// Replaces `$(NAME)` by the variable's value; unknown ones stay, `$$` is a single `$`.
pub(crate) fn expand(text: &str, env: &[(String, String)]) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        result.push_str(before);
        if let Some(after) = after.strip_prefix('$') {
            result.push('$');
            rest = after;
        } else if let Some((name, more)) = after.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            match env.iter().find(|(known, _)| known == name) {
                Some((_, value)) => result.push_str(value),
                None => result.push_str(&format!("$({name})")),
            }
            rest = more;
        } else {
            result.push('$');
            rest = after;
        }
    }
    result + rest
}

async fn from(
    client: &Client,
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    facts: &Facts,
) -> Result<Option<String>, String> {
    let namespace = pod.namespace().unwrap_or_default();
    if let Some(selector) = &source.field_ref {
        return field(pod, selector, facts).map(Some);
    }
    if let Some(selector) = &source.resource_field_ref {
        let of = selector.container_name.as_deref().unwrap_or(&container.name);
        let spec = pod.spec.iter().flat_map(|spec| &spec.containers).find(|c| c.name == of).unwrap_or(container);
        return resource(spec, &selector.resource, selector.divisor.as_ref().map(|q| q.0.as_str())).map(Some);
    }
    let (values, key, optional, kind, name) = if let Some(wanted) = &source.config_map_key_ref {
        let optional = wanted.optional.unwrap_or(false);
        let values = config_map(client, &namespace, &wanted.name, optional).await?;
        (values, &wanted.key, optional, "ConfigMap", &wanted.name)
    } else if let Some(wanted) = &source.secret_key_ref {
        let optional = wanted.optional.unwrap_or(false);
        let values = secret(client, &namespace, &wanted.name, optional).await?;
        (values, &wanted.key, optional, "Secret", &wanted.name)
    } else {
        return Err("an environment variable refers to a source that is not supported".into());
    };
    match values.get(key).map(|value| String::from_utf8(value.clone())) {
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(_)) => Err(format!("key {key} in {kind} {namespace}/{name} is no text")),
        None if optional => Ok(None),
        None => Err(format!("couldn't find key {key} in {kind} {namespace}/{name}")),
    }
}

/// A field of the pod, as the downward API names them.
pub(crate) fn field(pod: &Pod, selector: &ObjectFieldSelector, facts: &Facts) -> Result<String, String> {
    let path = selector.field_path.as_str();
    let subscript = |of: &str| path.strip_prefix(of)?.strip_prefix("['")?.strip_suffix("']").map(|key| key.to_owned());
    let spec = pod.spec.as_ref();
    let lines = |map: &BTreeMap<String, String>| {
        map.iter().map(|(key, value)| format!("{key}={value:?}")).collect::<Vec<_>>().join("\n")
    };
    Ok(match path {
        "metadata.name" => pod.name_any(),
        "metadata.namespace" => pod.namespace().unwrap_or_default(),
        "metadata.uid" => pod.uid().unwrap_or_default(),
        "metadata.labels" => lines(pod.labels()),
        "metadata.annotations" => lines(pod.annotations()),
        "spec.nodeName" => facts.node_name.clone(),
        "spec.serviceAccountName" => {
            spec.and_then(|spec| spec.service_account_name.clone()).unwrap_or_else(|| "default".into())
        }
        "status.hostIP" | "status.hostIPs" => facts.node_ip.to_string(),
        "status.podIP" | "status.podIPs" => facts.pod_ip.to_string(),
        _ => {
            if let Some(key) = subscript("metadata.labels") {
                pod.labels().get(&key).cloned().unwrap_or_default()
            } else if let Some(key) = subscript("metadata.annotations") {
                pod.annotations().get(&key).cloned().unwrap_or_default()
            } else {
                return Err(format!("field {path:?} of a pod is not supported"));
            }
        }
    })
}

/// A limit or request of a container, in units of the divisor, rounded up.
pub(crate) fn resource(container: &Container, resource: &str, divisor: Option<&str>) -> Result<String, String> {
    let unsupported = || format!("resource {resource:?} is not supported");
    let (list, name) = resource.split_once('.').ok_or_else(unsupported)?;
    let resources = container.resources.as_ref();
    let list = match list {
        "limits" => resources.and_then(|r| r.limits.as_ref()),
        "requests" => resources.and_then(|r| r.requests.as_ref()),
        _ => return Err(unsupported()),
    };
    let value = list.and_then(|list| list.get(name)).and_then(|q| quantity::value(&q.0)).unwrap_or(0.0);
    let divisor = divisor.and_then(quantity::value).filter(|divisor| *divisor > 0.0).unwrap_or(1.0);
    Ok(format!("{}", (value / divisor).ceil() as u64))
}

/// The content of a config map.
pub(crate) async fn config_map(
    client: &Client,
    namespace: &str,
    name: &str,
    optional: bool,
) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(name).await {
        Ok(Some(map)) => {
            let text = map.data.into_iter().flatten().map(|(key, value)| (key, value.into_bytes()));
            let binary = map.binary_data.into_iter().flatten().map(|(key, value)| (key, value.0));
            Ok(text.chain(binary).collect())
        }
        Ok(None) if optional => Ok(BTreeMap::new()),
        Ok(None) => Err(format!("configmap {name:?} not found")),
        Err(error) => Err(format!("configmap {name:?}: {error}")),
    }
}

/// The content of a secret.
pub(crate) async fn secret(
    client: &Client,
    namespace: &str,
    name: &str,
    optional: bool,
) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
    match api.get_opt(name).await {
        Ok(Some(secret)) => Ok(secret.data.into_iter().flatten().map(|(key, value)| (key, value.0)).collect()),
        Ok(None) if optional => Ok(BTreeMap::new()),
        Ok(None) => Err(format!("secret {name:?} not found")),
        Err(error) => Err(format!("secret {name:?}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    use super::*;

    #[test]
    fn launchers_find_the_programs_that_were_named_for_their_node_and_nothing_else_of_its_environment() {
        let own = [("HOME", "/root"), ("GODWIT_QEMU", "/opt/qemu/bin/qemu-system-x86_64"), ("GODWIT_DATA_DIR", "/d")];
        let own = own.into_iter().map(|(name, value)| (name.into(), value.into()));
        assert_eq!(of_host(own), ["GODWIT_QEMU=/opt/qemu/bin/qemu-system-x86_64"]);
    }

    fn facts() -> Facts {
        Facts {
            node_name: "node1".into(),
            node_ip: "10.88.0.11".parse().unwrap(),
            pod_ip: "10.244.1.2".parse().unwrap(),
        }
    }

    #[test]
    fn references_to_variables_are_replaced() {
        let env = [("A".to_owned(), "1".to_owned())];
        assert_eq!(expand("x$(A)y$(B)$$(A)$", &env), "x1y$(B)$(A)$");
        assert_eq!(expand("$(A", &env), "$(A");
    }

    #[test]
    fn fields_of_the_pod_are_found() {
        let mut pod = Pod::default();
        pod.metadata.name = Some("p".into());
        pod.metadata.labels = Some(BTreeMap::from([("a/b".to_owned(), "c".to_owned())]));
        let get =
            |path: &str| field(&pod, &ObjectFieldSelector { field_path: path.into(), ..Default::default() }, &facts());
        assert_eq!(get("metadata.name").unwrap(), "p");
        assert_eq!(get("metadata.labels['a/b']").unwrap(), "c");
        assert_eq!(get("status.podIP").unwrap(), "10.244.1.2");
        assert_eq!(get("spec.nodeName").unwrap(), "node1");
        assert!(get("spec.containers[0]").is_err());
    }

    #[test]
    fn resources_are_divided_and_rounded_up() {
        let mut container = Container::default();
        let limits = BTreeMap::from([("memory".to_owned(), Quantity("100Mi".into()))]);
        container.resources.get_or_insert_default().limits = Some(limits);
        assert_eq!(resource(&container, "limits.memory", Some("1Mi")).unwrap(), "100");
        assert_eq!(resource(&container, "limits.memory", None).unwrap(), (100 << 20).to_string());
        assert_eq!(resource(&container, "requests.cpu", None).unwrap(), "0");
        assert!(resource(&container, "other.cpu", None).is_err());
    }
}
