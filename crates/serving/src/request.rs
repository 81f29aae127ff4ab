//! What a request is about, read from its method and path alone, and its query parameters.

use godwit_machinery::status::Status;
use http::{Method, Uri};

/// What a request is about. One parser for all kinds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestInfo {
    /// About objects; else `path` is all there is.
    pub is_resource: bool,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`; for other paths the method.
    pub verb: &'static str,
    /// The group, empty for the core group.
    pub group: String,
    /// The version.
    pub version: String,
    /// The namespace, empty outside of all.
    pub namespace: String,
    /// The plural.
    pub resource: String,
    /// The subresource, empty for the object itself.
    pub subresource: String,
    /// The object's name.
    pub name: String,
    /// What follows the subresource.
    pub rest: String,
    /// The path as it came.
    pub path: String,
}

impl RequestInfo {
    /// Reads it from a request's method, path and parameters.
    pub fn parse(method: &Method, uri: &Uri, params: &Params) -> Self {
        let path = uri.path();
        let plain = Self { verb: plain_verb(method), path: path.to_owned(), ..Self::default() };
        let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(decode).collect();
        let mut parts = parts.as_slice();
        let mut info = plain.clone();
        match parts {
            [api, version, rest @ ..] if api == "api" && !rest.is_empty() => {
                info.version = version.clone();
                parts = rest;
            }
            [apis, group, version, rest @ ..] if apis == "apis" && !rest.is_empty() => {
                info.group = group.clone();
                info.version = version.clone();
                parts = rest;
            }
            _ => return plain,
        }
        info.is_resource = true;
        // The old form /api/v1/watch/…
        let mut watch = params.flag("watch");
        if let [first, rest @ ..] = parts
            && first == "watch"
            && !rest.is_empty()
        {
            watch = true;
            parts = rest;
        }
        if let [first, namespace, rest @ ..] = parts
            && first == "namespaces"
        {
            info.namespace = namespace.clone();
            if rest.first().is_some_and(|next| next != "status" && next != "finalize") {
                parts = rest;
            }
        }
        let part = |at: usize| parts.get(at).cloned().unwrap_or_default();
        info.resource = part(0);
        info.name = part(1);
        info.subresource = part(2);
        info.rest = parts.get(3..).unwrap_or_default().join("/");
        let collection = info.name.is_empty();
        info.verb = match *method {
            Method::GET | Method::HEAD => match (watch, collection) {
                (true, _) if info.subresource.is_empty() => "watch",
                (_, true) => "list",
                _ => "get",
            },
            Method::POST => "create",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE if collection => "deletecollection",
            Method::DELETE => "delete",
            _ => "",
        };
        info
    }

    /// Actions may have names of several parts, such as `evacuate/cancel`: here, and where roles are asked.
    pub fn take_action(&mut self, actions: &[String]) {
        let whole = format!("{}/{}", self.subresource, self.rest);
        if actions.contains(&whole) {
            self.subresource = whole;
            self.rest.clear();
        }
    }
}

fn plain_verb(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => "",
    }
}

/// Undoes percent-encoding; what is no encoding or no UTF-8 stays as it is or becomes U+FFFD.
pub fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let hex = |offset: usize| bytes.get(at + offset).and_then(|b| char::from(*b).to_digit(16));
        match (byte, hex(1), hex(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            _ => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Query parameters.
#[derive(Debug, Clone, Default)]
pub struct Params(Vec<(String, String)>);

impl Params {
    /// Reads them from a request's target.
    pub fn parse(uri: &Uri) -> Self {
        let query = uri.query().unwrap_or_default();
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let clean = |text: &str| decode(&text.replace('+', " "));
            (clean(key), clean(value))
        });
        Self(pairs.collect())
    }

    /// All of them, in their order.
    pub fn pairs(&self) -> &[(String, String)] {
        &self.0
    }

    /// First value, empty if absent.
    pub fn get(&self, key: &str) -> &str {
        self.0.iter().find(|(k, _)| k == key).map_or("", |(_, value)| value)
    }

    /// All values of a parameter.
    pub fn all(&self, key: &str) -> Vec<&str> {
        self.0.iter().filter(|(k, _)| k == key).map(|(_, value)| value.as_str()).collect()
    }

    /// True for `1`, `true` and a parameter without a value.
    pub fn flag(&self, key: &str) -> bool {
        self.0
            .iter()
            .find(|(k, _)| k == key)
            .is_some_and(|(_, v)| matches!(v.as_str(), "" | "1" | "t" | "true" | "True"))
    }

    /// Whether nothing is to be stored.
    ///
    /// # Errors
    /// 400 for anything but `All`.
    pub fn dry_run(&self) -> Result<bool, Status> {
        let values = self.all("dryRun");
        match values.iter().find(|value| **value != "All" && !value.is_empty()) {
            None => Ok(values.contains(&"All")),
            Some(odd) => {
                Err(Status::bad_request(format!("dryRun: Unsupported value: {odd:?}: supported values: \"All\"")))
            }
        }
    }

    /// Whether a parameter is there.
    pub fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(k, _)| k == key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: Method, uri: &str) -> RequestInfo {
        let uri: Uri = uri.parse().unwrap();
        RequestInfo::parse(&method, &uri, &Params::parse(&uri))
    }

    fn short(method: Method, uri: &str) -> String {
        let i = info(method, uri);
        let group = format!("{}/{}", i.group, i.version);
        format!("{} {group} ns={} {} {} {}", i.verb, i.namespace, i.resource, i.name, i.subresource)
            .trim_end()
            .to_owned()
    }

    #[test]
    fn paths_of_objects() {
        assert_eq!(short(Method::GET, "/api/v1/pods"), "list /v1 ns= pods");
        assert_eq!(short(Method::GET, "/api/v1/namespaces"), "list /v1 ns= namespaces");
        assert_eq!(short(Method::GET, "/api/v1/namespaces/a"), "get /v1 ns=a namespaces a");
        assert_eq!(short(Method::PUT, "/api/v1/namespaces/a/finalize"), "update /v1 ns=a namespaces a finalize");
        assert_eq!(short(Method::GET, "/api/v1/namespaces/a/pods?watch=true"), "watch /v1 ns=a pods");
        assert_eq!(short(Method::GET, "/api/v1/watch/namespaces/a/pods"), "watch /v1 ns=a pods");
        assert_eq!(short(Method::GET, "/api/v1/namespaces/a/pods/b/log"), "get /v1 ns=a pods b log");
        assert_eq!(
            short(Method::PATCH, "/apis/kubevirt.io/v1/namespaces/a/virtualmachines/b%2D1/status"),
            "patch kubevirt.io/v1 ns=a virtualmachines b-1 status"
        );
        assert_eq!(short(Method::DELETE, "/apis/g.io/v1/things"), "deletecollection g.io/v1 ns= things");
    }

    #[test]
    fn actions_have_names_of_several_parts() {
        let uri = "/apis/sub.io/v1/namespaces/a/vms/b/evacuate/cancel";
        let mut one = info(Method::PUT, uri);
        one.take_action(&["evacuate".to_owned()]);
        assert_eq!((one.subresource.as_str(), one.rest.as_str()), ("evacuate", "cancel"));
        one.take_action(&["evacuate/cancel".to_owned()]);
        assert_eq!((one.subresource.as_str(), one.rest.as_str()), ("evacuate/cancel", ""));
    }

    #[test]
    fn other_paths() {
        for path in ["/", "/api", "/api/v1", "/apis", "/apis/g/v1", "/healthz", "/openapi/v3/api/v1", "//"] {
            assert!(!info(Method::GET, path).is_resource, "{path}");
        }
    }

    #[test]
    fn parameters() {
        let uri: Uri = "/x?labelSelector=a%20in+(b)&dryRun=All&dryRun=All&watch&bad=%zz&=".parse().unwrap();
        let params = Params::parse(&uri);
        assert_eq!(params.get("labelSelector"), "a in (b)");
        assert_eq!(params.all("dryRun"), ["All", "All"]);
        assert!(params.flag("watch") && !params.flag("follow") && params.has("bad"));
        assert_eq!(params.get("bad"), "%zz");
    }
}
