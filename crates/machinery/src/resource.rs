//! The table of kinds: everything that the generic REST handlers, discovery and OpenAPI need to know about one resource.

use crate::schema::Schema;
use std::sync::Arc;

/// Group and version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupVersion {
    /// Empty for the core group.
    pub group: String,
    /// Such as `v1`.
    pub version: String,
}

/// One served version of one resource.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Group and version.
    pub gv: GroupVersion,
    /// `Pod`
    pub kind: String,
    /// `PodList`
    pub list_kind: String,
    /// `pods`
    pub plural: String,
    /// `pod`
    pub singular: String,
    /// `po`
    pub short_names: Vec<String>,
    /// `all`
    pub categories: Vec<String>,
    /// false: cluster-scoped
    pub namespaced: bool,
    /// Has `/status`: then main writes leave status alone and status writes leave the rest alone.
    pub status_subresource: bool,
    /// Extra subresources served for it, such as `log`, `binding`, `eviction`.
    pub subresources: Vec<String>,
    /// Schema of the whole object.
    pub schema: Arc<Schema>,
    /// What `kubectl get` shows.
    pub columns: Columns,
    /// Sent as `Warning:` on every use of this version.
    pub deprecation_warning: Option<String>,
    /// Built-ins take strategic merge patches, custom resources do not.
    pub builtin: bool,
    /// Answers creation at once and stores nothing (access and token reviews); no other verb is served.
    pub virtual_create_only: bool,
    /// Nothing is kept of it: only its subresources are served, each an action (PUT) on an object of another group.
    pub actions_only: bool,
    /// Those of its actions that are asked with GET instead: they tell something, or open a stream.
    pub gettable: Vec<String>,
    /// The version in which objects are stored, where several are served.
    pub storage: bool,
}

impl GroupVersion {
    /// `v1` or `group/v1`, as `apiVersion` has it.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `api/v1` or `apis/group/v1`: where it is served.
    pub fn path(&self) -> String {
        if self.group.is_empty() {
            format!("api/{}", self.version)
        } else {
            format!("apis/{}/{}", self.group, self.version)
        }
    }

    /// The inverse of [`GroupVersion::api_version`].
    pub fn parse(api_version: &str) -> GroupVersion {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        GroupVersion { group: group.to_owned(), version: version.to_owned() }
    }
}

impl Resource {
    /// The verbs that discovery says, in alphabetical order.
    pub fn verbs(&self) -> &'static [&'static str] {
        if self.actions_only {
            &[]
        } else if self.virtual_create_only {
            &["create"]
        } else {
            &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
        }
    }

    /// `pods`, or `virtualmachines.kubevirt.io`: as messages name it.
    pub fn qualified(&self) -> String {
        if self.gv.group.is_empty() { self.plural.clone() } else { format!("{}.{}", self.plural, self.gv.group) }
    }
}

/// How rows of a table are made.
#[derive(Debug, Clone)]
pub enum Columns {
    /// Built-in printer for this kind; unknown kinds print Name and Age.
    Builtin,
    /// A CRD's `additionalPrinterColumns`.
    Custom(Vec<Column>),
}

/// One `additionalPrinterColumns` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Heading as written in the CRD.
    pub name: String,
    /// `string`, `integer`, `number`, `boolean`, `date`.
    pub ty: String,
    /// `date-time` and such, or empty.
    pub format: String,
    /// For `kubectl get` help.
    pub description: String,
    /// 0 shown always, more only with `-o wide`.
    pub priority: i32,
    /// `.status.phase`
    pub json_path: String,
}
