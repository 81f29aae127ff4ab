//! Two shapes that every type here repeats: a Kubernetes kind, and a string with known values.

/// Makes a struct with `metadata`, `spec` and `status` a Kubernetes kind.
///
/// `k8s_openapi::{Resource, Metadata}` are what `kube::Api<T>` asks for. `apiVersion` and `kind` are written from the type
/// and ignored on reading, so that an object served as `v1alpha3` is read as well.
///
/// `cluster` before the type makes it cluster-scoped.
macro_rules! kind {
    (cluster $ty:ident, $group:literal, $version:literal, $plural:literal, [$($field:ident),*]) => {
        kind!(@ k8s_openapi::ClusterResourceScope, $ty, $group, $version, $plural, [$($field),*]);
    };
    ($ty:ident, $group:literal, $version:literal, $plural:literal, [$($field:ident),*]) => {
        kind!(@ k8s_openapi::NamespaceResourceScope, $ty, $group, $version, $plural, [$($field),*]);
    };
    (@ $scope:ty, $ty:ident, $group:literal, $version:literal, $plural:literal, [$($field:ident),*]) => {
        impl k8s_openapi::Resource for $ty {
            const API_VERSION: &'static str = concat!($group, "/", $version);
            const GROUP: &'static str = $group;
            const KIND: &'static str = stringify!($ty);
            const VERSION: &'static str = $version;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = $scope;
        }

        impl k8s_openapi::ListableResource for $ty {
            const LIST_KIND: &'static str = concat!(stringify!($ty), "List");
        }

        impl k8s_openapi::Metadata for $ty {
            type Ty = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

            fn metadata(&self) -> &Self::Ty {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut Self::Ty {
                &mut self.metadata
            }
        }

        impl serde::Serialize for $ty {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                use serde::ser::SerializeStruct as _;
                let fields = 3 $(+ { let _ = stringify!($field); 1 })*;
                let mut out = serializer.serialize_struct(stringify!($ty), fields)?;
                out.serialize_field("apiVersion", <Self as k8s_openapi::Resource>::API_VERSION)?;
                out.serialize_field("kind", <Self as k8s_openapi::Resource>::KIND)?;
                out.serialize_field("metadata", &self.metadata)?;
                $(out.serialize_field(stringify!($field), &self.$field)?;)*
                out.end()
            }
        }

        impl $ty {
            /// Namespace and name, the way messages name an object.
            pub fn namespaced_name(&self) -> (&str, &str) {
                (self.metadata.namespace.as_deref().unwrap_or(""), self.metadata.name.as_deref().unwrap_or(""))
            }

            /// The object's UID, empty while it has none.
            pub fn uid(&self) -> &str {
                self.metadata.uid.as_deref().unwrap_or("")
            }

            /// Whether deletion has been asked for.
            pub fn is_deleting(&self) -> bool {
                self.metadata.deletion_timestamp.is_some()
            }

            /// The value of a label.
            pub fn label(&self, key: &str) -> Option<&str> {
                self.metadata.labels.as_ref()?.get(key).map(String::as_str)
            }

            /// The value of an annotation.
            pub fn annotation(&self, key: &str) -> Option<&str> {
                self.metadata.annotations.as_ref()?.get(key).map(String::as_str)
            }
        }
    };
}

/// A string with known values; any other value is kept as it came (`Other`), so that reading never fails.
macro_rules! string_enum {
    ($(#[$doc:meta])* $name:ident default $default:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$vdoc])* #[doc = concat!("`", $text, "`")] $variant,)*
            /// A value that godwit does not know, as it came.
            Other(String),
        }

        impl $name {
            /// The string in the API.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)*
                    Self::Other(text) => text,
                }
            }

            /// Whether this is the default, which is left out when writing.
            pub fn is_default(&self) -> bool {
                *self == Self::default()
            }

            /// Whether the value is one of the known ones.
            pub fn is_known(&self) -> bool {
                !matches!(self, Self::Other(_))
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::$default
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                match text {
                    $($text => Self::$variant,)*
                    other => Self::Other(other.to_owned()),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                Ok(Self::from(text.as_str()))
            }
        }

        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string" })
            }
        }
    };
}

/// A struct of the API: camelCase, every field optional on reading, empty ones left out on writing, unknown ones ignored.
macro_rules! api_struct {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident : $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            $($(#[$fdoc])* #[serde(skip_serializing_if = "crate::macros::Absent::absent")] pub $field: $ty,)*
        }
    };
}

/// Whether a field says nothing and is left out when writing.
pub(crate) trait Absent {
    /// True when the field is left out.
    fn absent(&self) -> bool;
}

impl<T> Absent for Option<T> {
    fn absent(&self) -> bool {
        self.is_none()
    }
}

impl<T> Absent for Vec<T> {
    fn absent(&self) -> bool {
        self.is_empty()
    }
}

impl<K, V> Absent for std::collections::BTreeMap<K, V> {
    fn absent(&self) -> bool {
        self.is_empty()
    }
}

/// Strings are written even when empty where the type says `String`: those fields are required ones.
impl Absent for String {
    fn absent(&self) -> bool {
        false
    }
}

/// Fields of these types are left out when they are all default.
macro_rules! always_or_default {
    ($($ty:ty),*) => {$(impl crate::macros::Absent for $ty {
        fn absent(&self) -> bool {
            *self == Self::default()
        }
    })*};
}
