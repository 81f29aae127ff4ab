use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;

use godwit_api::Installation;
use http::{HeaderMap, Method};
use http_body_util::Full;
use kube::client::Body as ClientBody;
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::CertificateDer;
use serde_json::json;
use tokio::runtime::Runtime;

use super::front_proxy::{ConfigError, Stranger};
use super::*;

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "proxies");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        Self { pem: params.self_signed(&key).unwrap().pem(), issuer: Issuer::new(params, key) }
    }

    fn client(&self, name: &str) -> Vec<CertificateDer<'static>> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        vec![params.signed_by(&KeyPair::generate().unwrap(), &self.issuer).unwrap().der().clone()]
    }

    /// As kube-apiserver writes it.
    fn data(&self) -> BTreeMap<String, String> {
        let of = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        BTreeMap::from([
            of("client-ca-file", "another"),
            of("requestheader-client-ca-file", &self.pem),
            of("requestheader-allowed-names", r#"["front-proxy-client"]"#),
            of("requestheader-username-headers", r#"["X-Remote-User"]"#),
            of("requestheader-uid-headers", r#"["X-Remote-Uid"]"#),
            of("requestheader-group-headers", r#"["X-Remote-Group"]"#),
            of("requestheader-extra-headers-prefix", r#"["X-Remote-Extra-"]"#),
        ])
    }
}

fn headers(list: &[(&str, &str)]) -> HeaderMap {
    let one = |(name, value): &(&str, &str)| (name.parse::<http::HeaderName>().unwrap(), value.parse().unwrap());
    list.iter().map(one).collect()
}

#[test]
fn the_front_proxy_says_who_asks() {
    let ca = Ca::new();
    let proxy = FrontProxy::read(&ca.data()).unwrap();
    let said = headers(&[
        ("X-Remote-User", "jane"),
        ("X-Remote-Uid", "7"),
        ("X-Remote-Group", "admins"),
        ("X-Remote-Group", "system:authenticated"),
        ("X-Remote-Extra-Scopes", "a"),
        ("X-Remote-Extra-Scopes", "b"),
        ("X-Remote-Extra-authentication.kubernetes.io%2Fnode-name", "node1"),
        ("Impersonate-User", "root"),
    ]);
    let who = |certificates: &[CertificateDer<'_>], said| proxy.authenticate(certificates, said, UnixTime::now());
    let jane = who(&ca.client("front-proxy-client"), &said).unwrap();
    assert_eq!((jane.name.as_str(), jane.uid.as_str()), ("jane", "7"));
    assert_eq!(jane.groups, ["admins", "system:authenticated"]);
    assert_eq!(jane.extra["scopes"], ["a", "b"]);
    assert_eq!(jane.extra["authentication.kubernetes.io/node-name"], ["node1"]);

    assert_eq!(who(&[], &said), Err(Stranger::NoCertificate));
    let other = who(&ca.client("somebody"), &said).unwrap_err().to_string();
    assert!(other.contains("\"somebody\"") && other.contains("\"front-proxy-client\""), "{other}");
    assert!(matches!(who(&Ca::new().client("front-proxy-client"), &said), Err(Stranger::Certificate(_))));
    let nobody = headers(&[("X-Remote-Group", "system:masters")]);
    assert_eq!(who(&ca.client("front-proxy-client"), &nobody), Err(Stranger::NoUser));
    let junk = vec![CertificateDer::from(vec![1, 2, 3])];
    assert!(matches!(who(&junk, &said), Err(Stranger::Certificate(_))));
}

#[test]
fn an_api_server_without_a_front_proxy_is_told_from_a_broken_one() {
    let ca = Ca::new();
    let with = |key: &str, value: &str| {
        let mut data = ca.data();
        data.insert(key.to_owned(), value.to_owned());
        FrontProxy::read(&data)
    };
    let any = with("requestheader-allowed-names", "[]").unwrap();
    assert!(any.authenticate(&ca.client("any"), &headers(&[("X-Remote-User", "u")]), UnixTime::now()).is_ok());
    assert_eq!(with("requestheader-client-ca-file", "").unwrap_err(), ConfigError::NoProxy);
    assert_eq!(FrontProxy::read(&BTreeMap::new()).unwrap_err(), ConfigError::NoProxy);
    for (key, value) in [
        ("requestheader-client-ca-file", "junk"),
        ("requestheader-allowed-names", "junk"),
        ("requestheader-username-headers", r#"["a b"]"#),
    ] {
        let error = with(key, value).unwrap_err();
        assert!(matches!(&error, ConfigError::Value { key: named, .. } if *named == key), "{error}");
    }
}

/// An API server with these objects, by path, that lets nobody but jane.
fn server(objects: &'static [(&'static str, &'static str)]) -> kube::Client {
    let answer = move |request: http::Request<ClientBody>| async move {
        let path = request.uri().path().to_owned();
        let found = objects.iter().find(|(known, _)| *known == path).map(|(_, object)| (*object).to_owned());
        let (code, text) = if path.ends_with("/subjectaccessreviews") {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let mut review: Value = serde_json::from_slice(&body).unwrap();
            review["status"] = json!({ "allowed": review["spec"]["user"] == "jane" });
            (201, review.to_string())
        } else if let Some(text) = found {
            (200, text)
        } else {
            let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404,
                "reason": "NotFound", "message": "no" });
            (404, status.to_string())
        };
        let response = http::Response::builder().status(code).body(ClientBody::from(text.into_bytes()));
        Ok::<_, Infallible>(response.unwrap())
    };
    kube::Client::new(tower::service_fn(answer), "default")
}

fn aggregated(client: kube::Client, ca: &Ca) -> Aggregated {
    let front = FrontClient::showing(
        Arc::new(|| Err("there is no certificate".to_owned())),
        Arc::new(|_| Box::pin(std::future::ready(Err(std::io::ErrorKind::ConnectionRefused.into())))),
    );
    let cluster = Cluster { client, installation: Installation::new("elsewhere") };
    let api = Aggregated::new(cluster, front, signal::channel(false).1);
    api.trust(FrontProxy::read(&ca.data()).unwrap());
    api
}

fn connection(certificates: Vec<CertificateDer<'static>>) -> Connection {
    Connection { from: SocketAddr::from(([127, 0, 0, 1], 1)), certificates: certificates.into() }
}

async fn ask_for(api: &Aggregated, ca: &Ca, user: &str, method: Method, path: &str) -> (u16, Value) {
    let request = Request::builder().method(method).uri(path).header("X-Remote-User", user);
    let request = request.body(Full::new(Bytes::new())).unwrap();
    let response = api.handle(request, &connection(ca.client("front-proxy-client"))).await;
    let code = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

const VMI: &str = r#"{"apiVersion": "kubevirt.io/v1", "kind": "VirtualMachineInstance", "spec": {"domain": {"devices": {}}},
    "metadata": {"name": "flyer", "namespace": "ns", "uid": "u", "resourceVersion": "1"}, "status": {"phase": "Scheduling"}}"#;

#[tokio::test]
async fn who_may_not_is_told_as_kubernetes_tells_it() {
    let ca = Ca::new();
    let api = aggregated(server(&[("/apis/kubevirt.io/v1/namespaces/ns/virtualmachineinstances/flyer", VMI)]), &ca);
    let path = "/apis/subresources.kubevirt.io/v1/namespaces/ns/virtualmachineinstances/flyer/pause";
    let (code, said) = ask_for(&api, &ca, "joe", Method::PUT, path).await;
    assert_eq!(code, 403);
    assert_eq!(
        said["message"],
        "virtualmachineinstances.subresources.kubevirt.io \"flyer\" is forbidden: User \"joe\" cannot update resource \
         \"virtualmachineinstances/pause\" in API group \"subresources.kubevirt.io\" in the namespace \"ns\""
    );
    // Of those who may, the rules are asked.
    let (code, said) = ask_for(&api, &ca, "jane", Method::PUT, path).await;
    assert_eq!((code, said["reason"].as_str()), (409, Some("Conflict")), "{said}");
    let (code, said) = ask_for(&api, &ca, "jane", Method::PUT, &path.replace("flyer", "nobody")).await;
    assert_eq!((code, said["reason"].as_str()), (404, Some("NotFound")), "{said}");
    assert_eq!(ask_for(&api, &ca, "jane", Method::POST, path).await.0, 405);
    let (code, said) = ask_for(&api, &ca, "jane", Method::GET, &path.replace("pause", "usbredir")).await;
    assert_eq!(code, 501, "{said}");
    // Without the front proxy's certificate nobody is anybody.
    let request = Request::put(path).header("X-Remote-User", "jane").body(Full::new(Bytes::new())).unwrap();
    assert_eq!(api.handle(request, &connection(Vec::new())).await.status(), 401);
}

fn describes_its_actions(document: &Value, version: &str) {
    let base = format!("/apis/subresources.kubevirt.io/{version}/namespaces/{{namespace}}");
    for (path, method) in [("virtualmachines/{name}/start", "put"), ("virtualmachineinstances/{name}/vnc", "get")] {
        let item = &document["paths"][format!("{base}/{path}")];
        assert!(item[method]["responses"]["200"].is_object(), "{path}: {item}");
        assert_eq!(item["parameters"].as_array().map(Vec::len), Some(2), "{path}: {item}");
    }
}

#[test]
fn where_somebody_asks_from_is_what_the_front_proxy_says_last() {
    let proxy: SocketAddr = "10.0.0.1:443".parse().unwrap();
    let from = |said: &[(&str, &str)]| front_proxy::asker(&headers(said), proxy);
    assert_eq!(from(&[]), "10.0.0.1:443");
    assert_eq!(from(&[("X-Forwarded-For", "192.0.2.7")]), "192.0.2.7");
    // Its client may say what it likes before that.
    assert_eq!(from(&[("X-Forwarded-For", "203.0.113.1, 192.0.2.7")]), "192.0.2.7");
    assert_eq!(from(&[("X-Forwarded-For", "203.0.113.1"), ("X-Forwarded-For", "2001:db8::7")]), "2001:db8::7");
    assert_eq!(from(&[("X-Forwarded-For", "nobody")]), "10.0.0.1:443");
}

#[tokio::test]
async fn discovery_names_what_is_served() {
    let ca = Ca::new();
    let api = aggregated(server(&[]), &ca);
    let (code, list) = ask_for(&api, &ca, "joe", Method::GET, "/apis/subresources.kubevirt.io/v1").await;
    assert_eq!(code, 200);
    let names: Vec<&str> =
        list["resources"].as_array().unwrap().iter().filter_map(|one| one["name"].as_str()).collect();
    for name in ["virtualmachines/start", "virtualmachines/migrate", "virtualmachineinstances/console"] {
        assert!(names.contains(&name), "{names:?}");
    }
    for path in ["/apis", "/apis/subresources.kubevirt.io", "/apis/subresources.kubevirt.io/v1alpha3", "/openapi/v2"] {
        assert_eq!(ask_for(&api, &ca, "joe", Method::GET, path).await.0, 200, "{path}");
    }
    let (_, index) = ask_for(&api, &ca, "joe", Method::GET, "/openapi/v3").await;
    for version in ["v1", "v1alpha3"] {
        let path = format!("apis/subresources.kubevirt.io/{version}");
        let url = index["paths"][&path]["serverRelativeURL"].as_str().unwrap().to_owned();
        let (code, document) = ask_for(&api, &ca, "joe", Method::GET, &url).await;
        assert_eq!(code, 200, "{url}");
        describes_its_actions(&document, version);
        let (_, v2) = ask_for(&api, &ca, "joe", Method::GET, "/openapi/v2").await;
        describes_its_actions(&v2, version);
    }
    for path in ["/apis/kubevirt.io/v1", "/api", "/apis/subresources.kubevirt.io/v2"] {
        assert_eq!(ask_for(&api, &ca, "joe", Method::GET, path).await.0, 404, "{path}");
    }
}

#[tokio::test]
async fn nobody_is_let_in_before_the_front_proxy_is_known() {
    let ca = Ca::new();
    let api = aggregated(server(&[]), &ca);
    *api.proxy.write().unwrap() = None;
    assert!(!api.is_ready());
    assert_eq!(ask_for(&api, &ca, "jane", Method::GET, "/apis").await.0, 503);
}

fn part() -> impl Strategy<Value = String> {
    let known = [
        "apis",
        "subresources.kubevirt.io",
        "v1",
        "v1alpha3",
        "namespaces",
        "ns",
        "virtualmachines",
        "flyer",
        "virtualmachineinstances",
        "pause",
        "console",
        "vnc",
        "addvolume",
        "evacuate",
        "cancel",
        "start",
        "version",
        "openapi",
        "",
    ];
    prop_oneof![4 => prop::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => "[a-z%0-9]{0,6}"]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever comes is answered, and never by a panic.
    #[test]
    fn junk_is_answered(
        parts in prop::collection::vec(part(), 0..9), query in "[a-zA-Z=&%0-9]{0,12}", method in prop::sample::select(vec!["GET", "PUT", "POST", "HEAD", "PATCH"]),
        body in prop_oneof![
            Just(Vec::new()), prop::collection::vec(any::<u8>(), 0..40), Just(b"{\"dryRun\": 5, \"name\": {}}".to_vec()), Just(b"[[[".to_vec()),
        ],
        names in prop::collection::vec((prop::sample::select(vec!["X-Remote-User", "X-Remote-Extra-%zz", "Upgrade", "Accept",
            "Content-Type", "Sec-WebSocket-Key"]), "[ -~]{0,10}"), 0..5),
    ) {
        let ca = Ca::new();
        let certificates = ca.client("front-proxy-client");
        let runtime = Runtime::new().unwrap();
        let said = runtime.block_on(async {
            let api = aggregated(server(&[("/apis/kubevirt.io/v1/namespaces/ns/virtualmachineinstances/flyer", VMI)]), &ca);
            let uri = format!("/{}?{query}", parts.join("/"));
            let mut request = Request::builder().method(method).uri(uri).header("X-Remote-User", "jane");
            for (name, value) in &names {
                request = request.header(*name, value);
            }
            let Ok(request) = request.body(Full::new(Bytes::from(body.clone()))) else { return None };
            let response = api.handle(request, &connection(certificates)).await;
            let bytes = response.into_body().collect().await.unwrap().to_bytes();
            Some(String::from_utf8_lossy(&bytes).into_owned())
        });
        prop_assert!(!said.unwrap_or_default().contains("this is a bug"));
    }
}
