//! Where godwit is installed.

use std::borrow::Cow;

use crate::names::KUBEVIRT_NAMESPACE;

/// An installation of godwit, by the namespace of its components. Their own objects are there too: the KubeVirt object, the ConfigMaps,
/// leases, Secrets and accounts. There is one in a cluster; what is in other namespaces under the same names is somebody else's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installation(Cow<'static, str>);

impl Installation {
    /// The one in [`KUBEVIRT_NAMESPACE`], as KubeVirt's is, and the only one that there is on the embedded API server.
    pub const USUAL: Self = Self(Cow::Borrowed(KUBEVIRT_NAMESPACE));

    /// The one in this namespace.
    pub fn new(namespace: impl Into<String>) -> Self {
        Self(Cow::Owned(namespace.into()))
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.0
    }

    /// The user that one of its service accounts is.
    pub fn user(&self, account: &str) -> String {
        format!("system:serviceaccount:{}:{account}", self.0)
    }

    /// Whether a user is one of its service accounts.
    pub fn has_user(&self, user: &str) -> bool {
        self.account_of(user).is_some()
    }

    /// Whether a user is this one of its service accounts.
    pub fn is_user(&self, user: &str, account: &str) -> bool {
        self.account_of(user) == Some(account)
    }

    /// The name of the service account that a user is, if it is one of these.
    fn account_of<'a>(&self, user: &'a str) -> Option<&'a str> {
        let account = user.strip_prefix("system:serviceaccount:")?;
        account.strip_prefix(self.namespace())?.strip_prefix(':')
    }
}

impl Default for Installation {
    fn default() -> Self {
        Self::USUAL
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_accounts_of_its_own_namespace_are_its_own() {
        let usual = Installation::default();
        assert_eq!(usual.user("kubevirt-handler"), "system:serviceaccount:kubevirt:kubevirt-handler");
        let elsewhere = Installation::new("kube");
        assert!(elsewhere.has_user("system:serviceaccount:kube:anybody"));
        assert!(elsewhere.is_user(&elsewhere.user("a"), "a") && !elsewhere.is_user(&elsewhere.user("ab"), "a"));
        for stranger in [usual.user("anybody").as_str(), "system:serviceaccount:kubex:a", "kube:a", "admin", ""] {
            assert!(!elsewhere.has_user(stranger), "{stranger}");
        }
    }
}
