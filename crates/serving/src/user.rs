//! Who asks: client certificates, anonymous, impersonation.

use http::HeaderMap;
use std::collections::BTreeMap;
use x509_parser::prelude::{FromDer, X509Certificate};

/// Everyone who showed a valid certificate.
pub const AUTHENTICATED: &str = "system:authenticated";
/// Everyone else.
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
/// The user without a certificate.
pub const ANONYMOUS: &str = "system:anonymous";
/// What a service account's token says of the node of its pod (Kubernetes' name).
pub const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
/// The group that may do everything.
pub const MASTERS: &str = "system:masters";

/// An authenticated (or anonymous) user. Insert it as an extension into requests to the in-process service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// `system:node:node1`
    pub name: String,
    /// `system:nodes`, `system:authenticated`
    pub groups: Vec<String>,
    /// Opaque id, seldom there.
    pub uid: String,
    /// Anything else that impersonation or authentication said.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl User {
    /// An authenticated user.
    pub fn new(name: impl Into<String>, groups: &[&str]) -> Self {
        let mut groups: Vec<String> = groups.iter().map(|group| (*group).to_owned()).collect();
        if !groups.iter().any(|group| group == AUTHENTICATED) {
            groups.push(AUTHENTICATED.to_owned());
        }
        Self { name: name.into(), groups, uid: String::new(), extra: BTreeMap::new() }
    }

    /// The user without a certificate.
    pub fn anonymous() -> Self {
        Self {
            name: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            uid: String::new(),
            extra: BTreeMap::new(),
        }
    }

    /// The cluster's administrator, as the server itself acts.
    pub fn system() -> Self {
        Self::new("system:apiserver", &[MASTERS])
    }

    /// Whether RBAC does not matter.
    pub fn is_master(&self) -> bool {
        self.groups.iter().any(|group| group == MASTERS)
    }

    /// The user that a verified client certificate stands for: common name and organisations. A service account's organisational
    /// unit is the node of its pod, as a token bound to a pod would say it.
    pub fn from_certificate(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let subject = certificate.subject();
        let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
        if name.is_empty() {
            return None;
        }
        let groups: Vec<&str> = subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
        let node = subject.iter_organizational_unit().next().and_then(|unit| unit.as_str().ok());
        let mut user = Self::new(name, &groups);
        if let (Some(node), true) = (node, service_account(&user.name).is_some()) {
            user.extra.insert(NODE_NAME.to_owned(), vec![node.to_owned()]);
        }
        Some(user)
    }
}

/// Who the request wants to be instead: `kubectl --as`.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Impersonation {
    /// The name.
    pub user: String,
    /// The uid, mostly empty.
    pub uid: String,
    /// The groups.
    pub groups: Vec<String>,
    /// Anything else.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl Impersonation {
    /// What the headers say.
    ///
    /// # Errors
    /// Groups or more are wanted without a user.
    pub fn parse(headers: &HeaderMap) -> Result<Option<Self>, &'static str> {
        let all = |name: &str| -> Vec<String> {
            headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).map(str::to_owned).collect()
        };
        let mut wanted = Self {
            user: all("impersonate-user").into_iter().next().unwrap_or_default(),
            uid: all("impersonate-uid").into_iter().next().unwrap_or_default(),
            groups: all("impersonate-group"),
            extra: BTreeMap::new(),
        };
        for name in headers.keys() {
            if let Some(key) = name.as_str().strip_prefix("impersonate-extra-") {
                wanted.extra.insert(key.to_owned(), all(name.as_str()));
            }
        }
        if wanted == Self::default() {
            return Ok(None);
        }
        if wanted.user.is_empty() {
            return Err("requested impersonation without a user");
        }
        Ok(Some(wanted))
    }

    /// The user to act as, with the groups that everyone of the kind has.
    pub fn into_user(self) -> User {
        let mut groups = self.groups;
        if groups.is_empty()
            && let Some((namespace, _)) = service_account(&self.user)
        {
            groups.push("system:serviceaccounts".to_owned());
            groups.push(format!("system:serviceaccounts:{namespace}"));
        }
        let everyone = if self.user == ANONYMOUS { UNAUTHENTICATED } else { AUTHENTICATED };
        if !groups.iter().any(|group| group == everyone) {
            groups.push(everyone.to_owned());
        }
        User { name: self.user, groups, uid: self.uid, extra: self.extra }
    }
}

/// Namespace and name of the service account that a user name stands for.
pub fn service_account(user: &str) -> Option<(&str, &str)> {
    user.strip_prefix("system:serviceaccount:")?.split_once(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impersonation_needs_a_user() {
        let mut headers = HeaderMap::new();
        assert_eq!(Impersonation::parse(&headers), Ok(None));
        headers.append("Impersonate-Group", "a".parse().unwrap());
        assert!(Impersonation::parse(&headers).is_err());
        headers.append("Impersonate-User", "system:serviceaccount:ns:sa".parse().unwrap());
        let user = Impersonation::parse(&headers).unwrap().unwrap().into_user();
        assert_eq!(user.groups, ["a", AUTHENTICATED]);
    }

    #[test]
    fn a_service_account_brings_its_groups() {
        let wanted = Impersonation { user: "system:serviceaccount:ns:sa".into(), ..Default::default() };
        let groups = wanted.into_user().groups;
        assert_eq!(groups, ["system:serviceaccounts", "system:serviceaccounts:ns", AUTHENTICATED]);
    }

    #[test]
    fn rubbish_is_nobody() {
        assert_eq!(User::from_certificate(b"rubbish"), None);
    }
}
