//! NetworkAttachmentDefinition (`k8s.cni.cncf.io/v1`): a network beside the pod network.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use schemars::JsonSchema;
use serde::Deserialize;

/// A network beside the pod network, described by a CNI configuration.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
#[serde(default)]
pub struct NetworkAttachmentDefinition {
    /// Standard object metadata.
    pub metadata: ObjectMeta,
    /// The network.
    pub spec: NetworkAttachmentDefinitionSpec,
}

kind!(NetworkAttachmentDefinition, "k8s.cni.cncf.io", "v1", "network-attachment-definitions", [spec]);

api_struct! {
    /// The network.
    NetworkAttachmentDefinitionSpec {
        /// A CNI configuration, JSON in a string.
        config: Option<String>,
    }
}

/// What godwit reads of a CNI configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct CniConfig {
    /// The plugin: `bridge` is the one that godwit knows (also `cnv-bridge`, OpenShift's name for it).
    #[serde(rename = "type")]
    pub type_: String,
    /// The bridge's name.
    pub bridge: Option<String>,
    /// The MTU.
    pub mtu: Option<u32>,
    /// The network's name.
    pub name: Option<String>,
    /// A list of plugins; the first counts.
    pub plugins: Vec<CniConfig>,
}

/// Why a NetworkAttachmentDefinition cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NadError {
    /// There is no configuration.
    #[error("spec.config is missing: give a CNI configuration of type bridge")]
    Missing,
    /// The configuration is no JSON of the expected form.
    #[error("spec.config is no CNI configuration: {0}")]
    Malformed(String),
    /// The plugin is not known.
    #[error("CNI plugin type {0:?} is not implemented by godwit: use type \"bridge\"")]
    Unsupported(String),
    /// The name of the bridge cannot be one.
    #[error("{0:?} is no name of a bridge: 1 to 15 letters, digits, '-', '_' or '.'")]
    BadBridge(String),
}

impl NetworkAttachmentDefinition {
    /// The name of the bridge that this network is.
    pub fn bridge(&self) -> Result<String, NadError> {
        let text = self.spec.config.as_deref().filter(|text| !text.trim().is_empty()).ok_or(NadError::Missing)?;
        let config: CniConfig = serde_json::from_str(text).map_err(|error| NadError::Malformed(error.to_string()))?;
        let plugin =
            if config.type_.is_empty() { config.plugins.into_iter().next().unwrap_or_default() } else { config };
        if !matches!(plugin.type_.as_str(), "bridge" | "cnv-bridge") {
            return Err(NadError::Unsupported(plugin.type_));
        }
        let bridge = plugin.bridge.unwrap_or_else(|| "cni0".to_owned());
        let fits = (1..=15).contains(&bridge.len())
            && bridge.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
            && bridge != "."
            && bridge != "..";
        if fits { Ok(bridge) } else { Err(NadError::BadBridge(bridge)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nad(config: &str) -> NetworkAttachmentDefinition {
        NetworkAttachmentDefinition {
            spec: NetworkAttachmentDefinitionSpec { config: Some(config.to_owned()) },
            ..Default::default()
        }
    }

    #[test]
    fn finds_the_bridge() {
        assert_eq!(nad(r#"{"cniVersion":"0.3.1","type":"bridge","bridge":"br1"}"#).bridge().unwrap(), "br1");
        assert_eq!(nad(r#"{"plugins":[{"type":"cnv-bridge","bridge":"br2"}]}"#).bridge().unwrap(), "br2");
    }

    #[test]
    fn says_what_is_wrong() {
        assert_eq!(NetworkAttachmentDefinition::default().bridge(), Err(NadError::Missing));
        assert_eq!(nad(r#"{"type":"macvlan"}"#).bridge(), Err(NadError::Unsupported("macvlan".into())));
        assert!(matches!(nad("[").bridge(), Err(NadError::Malformed(_))));
        assert!(matches!(nad(r#"{"type":"bridge","bridge":"a/b"}"#).bridge(), Err(NadError::BadBridge(_))));
    }
}
