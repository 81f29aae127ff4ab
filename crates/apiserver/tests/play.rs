//! Not a test: a server to play with for a while.
mod common;

#[test]
#[ignore = "by hand"]
fn play() {
    let cluster = common::Cluster::start();
    println!("KUBECONFIG={}", cluster.folder.path().join("admin.kubeconfig").display());
    std::fs::write("/tmp/gw-play", cluster.folder.path().join("admin.kubeconfig").display().to_string()).unwrap();
    while std::path::Path::new("/tmp/gw-play").exists() {
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
}
