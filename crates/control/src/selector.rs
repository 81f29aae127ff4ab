//! Label selectors and node selectors.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, NodeSelector, NodeSelectorRequirement};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::object::{Stored, labels};

/// Whether labels satisfy a selector. An empty selector matches everything; an unknown operator matches nothing.
pub fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let exact = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    exact
        && selector.match_expressions.iter().flatten().all(|requirement| {
            holds(&requirement.operator, requirement.values.as_deref(), labels.get(&requirement.key))
        })
}

/// Whether a node satisfies a node selector: any of its terms, each of them with all of its requirements.
pub fn node_matches(selector: &NodeSelector, node: &Node) -> bool {
    selector.node_selector_terms.iter().any(|term| {
        let expressions = term.match_expressions.as_deref().unwrap_or_default();
        let fields = term.match_fields.as_deref().unwrap_or_default();
        // A term without requirements selects nothing (Kubernetes' rule).
        (!expressions.is_empty() || !fields.is_empty())
            && expressions.iter().all(|one| node_holds(one, labels(&node.metadata).get(&one.key)))
            && fields.iter().all(|one| {
                let name = node.name().to_owned();
                node_holds(one, (one.key == "metadata.name").then_some(&name))
            })
    })
}

fn node_holds(requirement: &NodeSelectorRequirement, value: Option<&String>) -> bool {
    holds(&requirement.operator, requirement.values.as_deref(), value)
}

fn holds(operator: &str, values: Option<&[String]>, value: Option<&String>) -> bool {
    let values = values.unwrap_or_default();
    match operator {
        "In" => value.is_some_and(|value| values.contains(value)),
        "NotIn" => value.is_none_or(|value| !values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" | "Lt" => {
            let have: Option<i64> = value.and_then(|value| value.parse().ok());
            let bound: Option<i64> = values.first().and_then(|value| value.parse().ok());
            match (have, bound) {
                (Some(have), Some(bound)) if operator == "Gt" => have > bound,
                (Some(have), Some(bound)) => have < bound,
                _ => false,
            }
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        for (selector, expected) in [
            (json!({}), true),
            (json!({"matchLabels": {"app": "web"}}), true),
            (json!({"matchLabels": {"app": "db"}}), false),
            (json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "db"]}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["web"]}]}), false),
            (json!({"matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]}), true),
            (json!({"matchExpressions": [{"key": "app", "operator": "Nonsense"}]}), false),
        ] {
            let selector: LabelSelector = serde_json::from_value(selector).unwrap();
            assert_eq!(matches(&selector, &labels), expected, "{selector:?}");
        }
    }

    #[test]
    fn node_selectors() {
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "node1", "labels": {"cores": "8"}}})).unwrap();
        for (terms, expected) in [
            (json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node1"]}]}]), true),
            (json!([{"matchExpressions": [{"key": "cores", "operator": "Gt", "values": ["4"]}]}]), true),
            (json!([{"matchExpressions": [{"key": "cores", "operator": "Lt", "values": ["4"]}]}]), false),
            (json!([{}]), false),
            (json!([{}, {"matchExpressions": [{"key": "cores", "operator": "Exists"}]}]), true),
        ] {
            let selector: NodeSelector = serde_json::from_value(json!({"nodeSelectorTerms": terms})).unwrap();
            assert_eq!(node_matches(&selector, &node), expected, "{selector:?}");
        }
    }
}
