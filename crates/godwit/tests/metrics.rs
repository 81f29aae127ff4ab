//! What Prometheus reads of running components, while real guests move: on etcd and kube-apiserver, where each component is a process.

#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::moving::{narrow_the_link, widen_the_link};
use common::real::{CONTROLLER, STANDBY, Wishes};
use common::{Cluster, status};
use godwit_guest_rom::Parameters;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

const GUEST: &str = "flyer";

/// Each series, as `name{label="value",…}`, with its value.
type Told = BTreeMap<String, f64>;

/// Asks over a connection, and reads the answer as Prometheus does: each line is a comment or a series.
fn read(mut stream: impl Read + Write) -> Told {
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("ask");
    let mut answer = String::new();
    // rustls takes the end of a connection without a word for an error.
    let _ = stream.read_to_string(&mut answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    assert!(head.to_lowercase().contains("content-type: application/openmetrics-text"), "{head}");
    assert!(body.trim_end().ends_with("# EOF"), "{body}");
    let series = body.lines().filter(|line| !line.starts_with('#'));
    series.map(|line| line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?}"))).fold(
        Told::new(),
        |mut told, (series, value)| {
            let value = value.parse().unwrap_or_else(|_| panic!("{series} {value}"));
            assert_eq!(told.insert(series.to_owned(), value), None, "{series} is there twice");
            told
        },
    )
}

fn controller(cluster: &Cluster, name: &str) -> Told {
    read(cluster.real.as_ref().expect("a real API server").dial_health(name))
}

/// Scrapes until something is so: a controller hears of things a moment after they happen.
async fn until(cluster: &Cluster, what: &str, is: impl Fn(&Told) -> bool) -> Told {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let told = controller(cluster, CONTROLLER);
        if is(&told) {
            return told;
        }
        assert!(Instant::now() < deadline, "not told: {what}\n{told:#?}\n{}", cluster.words());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn one(told: &Told, series: &str) -> f64 {
    *told.get(series).unwrap_or_else(|| panic!("no {series} in {told:#?}"))
}

/// `godwit api`, asked as its ServiceMonitor says: by the name of its Service, and known by the published CA.
async fn virt_api(cluster: &Cluster) -> Told {
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "kubevirt");
    let bundle = maps.get("godwit-ca-bundle").await.expect("the bundle").data.expect("data")["ca-bundle.crt"].clone();
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        roots.add(certificate.expect("PEM")).expect("a CA");
    }
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from("virt-api.kubevirt.svc").expect("a name");
    let connection = rustls::ClientConnection::new(Arc::new(config), name).expect("TLS");
    let stream = cluster.real.as_ref().expect("a real API server").dial_api();
    read(rustls::StreamOwned::new(connection, stream))
}

fn seconds(time: &str) -> f64 {
    time.parse::<jiff::Timestamp>().expect("a time").as_second() as f64
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrape_tells_of_a_guest_on_its_way_of_its_arrival_and_of_the_node_that_is_emptied() {
    let Some(cluster) = Cluster::wished(2, Wishes::default()).await else { return };
    cluster.build_rom_image(Parameters::default());
    cluster.start_rom_guest(GUEST).await;
    let mut held = common::rom_vmi("held");
    held["spec"]["evictionStrategy"] = json!("LiveMigrate");
    // Bridged to the pod network without leave to move.
    held["spec"]["domain"]["devices"] = json!({"interfaces": [{"name": "default", "bridge": {}}]});
    held["spec"]["networks"] = json!([{"name": "default", "pod": {}}]);
    cluster.apply(held).await.expect("apply");
    cluster.wait(&cluster.vmis(), "held", "it runs", |vmi| status(vmi, "phase") == "Running").await;
    let held_on = status(&cluster.vmis().get("held").await.expect("VMI"), "nodeName");
    let from = status(&cluster.vmis().get(GUEST).await.expect("VMI"), "nodeName");

    let non_evictable = format!("kubevirt_vmi_non_evictable{{node=\"{held_on}\",namespace=\"default\",name=\"held\"}}");
    let told = until(&cluster, "who cannot be evicted", |told| told.contains_key(&non_evictable)).await;
    assert_eq!(told.keys().filter(|series| series.starts_with("kubevirt_vmi_non_evictable")).count(), 1);
    assert_eq!(one(&told, "kubevirt_virt_controller_leading_status"), 1.0);
    assert_eq!(one(&told, "kubevirt_vmi_migrations_in_running_phase"), 0.0);
    for node in ["node1", "node2"] {
        assert_eq!(one(&told, &format!("godwit_node_handler_heard{{node=\"{node}\"}}")), 1.0);
        assert_eq!(one(&told, &format!("godwit_node_fenced{{node=\"{node}\"}}")), 0.0);
    }
    // Who does not decide tells of nothing but itself.
    let real = cluster.real.as_ref().expect("a real API server");
    real.start_controller(STANDBY);
    let deadline = Instant::now() + Duration::from_secs(120);
    let log = cluster.data_dir().join(format!("log/{STANDBY}.log"));
    while !std::fs::read_to_string(&log).expect("its log").contains("all kinds listed") {
        assert!(Instant::now() < deadline, "the second controller does not begin\n{}", cluster.words());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let standby = controller(&cluster, STANDBY);
    assert_eq!(one(&standby, "kubevirt_virt_controller_leading_status"), 0.0);
    assert_eq!(one(&standby, "kubevirt_virt_controller_ready_status"), 1.0);
    assert_eq!(standby.len(), 3, "{standby:#?}");

    // On its way.
    narrow_the_link(&cluster, &from);
    cluster.migrate(GUEST, "move").await;
    let vmi = |metric: &str, node: &str| format!("{metric}{{node=\"{node}\",namespace=\"default\",name=\"{GUEST}\"}}");
    let remaining = vmi("kubevirt_vmi_migration_data_remaining_bytes", &from);
    let told =
        until(&cluster, "what is still to copy", |told| told.get(&remaining).is_some_and(|left| *left > 0.0)).await;
    assert_eq!(one(&told, "kubevirt_vmi_migrations_in_running_phase"), 1.0);
    let total = one(&told, &vmi("kubevirt_vmi_migration_data_total_bytes", &from));
    assert!(total >= one(&told, &remaining), "{told:#?}");
    assert!(told.contains_key(&vmi("kubevirt_vmi_migration_data_processed_bytes", &from)), "{told:#?}");
    let began = format!(
        "kubevirt_vmi_migration_start_time_seconds{{node=\"{from}\",namespace=\"default\",name=\"{GUEST}\",migration_name=\"move\"}}"
    );
    let start = status(&cluster.vmis().get(GUEST).await.expect("VMI"), "migrationState/startTimestamp");
    assert_eq!(one(&told, &began), seconds(&start));

    // Arrived.
    widen_the_link(&cluster, &from);
    let over = |migration: &DynamicObject| ["Succeeded", "Failed"].contains(&status(migration, "phase").as_str());
    let migration = cluster.wait(&cluster.migrations(), "move", "it is over", over).await;
    assert_eq!(status(&migration, "phase"), "Succeeded", "{}\n{}", migration.data, cluster.words());
    let succeeded = format!("kubevirt_vmi_migration_succeeded{{vmi=\"{GUEST}\",vmim=\"move\",namespace=\"default\"}}");
    let after = cluster.vmis().get(GUEST).await.expect("VMI");
    let to = status(&after, "nodeName");
    let downtime = vmi("godwit_vmi_migration_downtime_seconds", &to);
    let told =
        until(&cluster, "that it has arrived", |told| told.contains_key(&succeeded) && told.contains_key(&downtime))
            .await;
    let measured =
        after.data["status"]["migrationState"]["progress"]["downtimeMilliseconds"].as_f64().expect("a downtime");
    assert_eq!(one(&told, &downtime), measured / 1000.0);
    let ended = format!(
        "kubevirt_vmi_migration_end_time_seconds{{node=\"{to}\",namespace=\"default\",name=\"{GUEST}\",migration_name=\"move\",status=\"succeeded\"}}"
    );
    assert_eq!(one(&told, &ended), seconds(&status(&after, "migrationState/endTimestamp")));
    assert!(
        !told.contains_key(&remaining) && !told.contains_key(&vmi("kubevirt_vmi_migration_data_remaining_bytes", &to))
    );
    assert_eq!(one(&told, "kubevirt_vmi_migrations_in_running_phase"), 0.0);

    // A node that is to be emptied, and cannot be.
    let kind = GroupVersionKind::gvk("nodemaintenance.medik8s.io", "v1beta1", "NodeMaintenance");
    let maintenances: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind));
    let maintenance = json!({
        "apiVersion": "nodemaintenance.medik8s.io/v1beta1", "kind": "NodeMaintenance", "metadata": {"name": "away"},
        "spec": {"nodeName": held_on},
    });
    let maintenance = serde_json::from_value(maintenance).expect("an object");
    maintenances.create(&Default::default(), &maintenance).await.expect("create");
    let closed = format!("godwit_node_closed{{node=\"{held_on}\"}}");
    let stands = format!("godwit_node_maintenance_vmis{{maintenance=\"away\",node=\"{held_on}\",state=\"Blocked\"}}");
    let is_blocked = |told: &Told| told.get(&closed) == Some(&1.0) && told.get(&stands) == Some(&1.0);
    let told = until(&cluster, "what keeps the node from being emptied", is_blocked).await;
    assert_eq!(one(&told, &non_evictable), 1.0);
    assert_eq!(
        one(&told, &format!("godwit_node_maintenance{{maintenance=\"away\",node=\"{held_on}\",phase=\"Running\"}}")),
        1.0
    );
    cluster.vmis().delete("held", &Default::default()).await.expect("delete");
    let empty = format!("godwit_node_maintenance{{maintenance=\"away\",node=\"{held_on}\",phase=\"Succeeded\"}}");
    let told = until(&cluster, "that the node is empty", |told| told.contains_key(&empty)).await;
    assert_eq!(
        one(&told, &format!("godwit_node_maintenance_drained_ratio{{maintenance=\"away\",node=\"{held_on}\"}}")),
        1.0
    );
    assert!(!told.contains_key(&non_evictable), "{told:#?}");
    maintenances.delete("away", &Default::default()).await.expect("delete");
    until(&cluster, "that the maintenance is over", |told| {
        !told.contains_key(&empty) && told.get(&closed) == Some(&0.0)
    })
    .await;

    let told = virt_api(&cluster).await;
    assert_eq!(one(&told, "kubevirt_virt_api_ready_status"), 1.0);
    let now = jiff::Timestamp::now().as_second() as f64;
    for certificate in ["ca", "serving", "calling"] {
        let end =
            one(&told, &format!("godwit_certificate_not_after_timestamp_seconds{{certificate=\"{certificate}\"}}"));
        assert!(end > now, "{certificate}: {end}");
    }
}
