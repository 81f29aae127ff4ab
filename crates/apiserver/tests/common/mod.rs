//! A server on a loopback socket with certificates of its own, and real kubectls pointed at it.

#![allow(clippy::unwrap_used, dead_code, reason = "a test may fail, and each uses its part")]

use godwit_apiserver::{Admission, DirectDialer, Options, TlsFiles, serve};
use godwit_store::Store;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use tempfile::TempDir;
use tokio::sync::oneshot;

/// A running server; stops when dropped.
pub struct Cluster {
    pub folder: TempDir,
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    authority: Issuer<'static, KeyPair>,
}

fn client_pair(authority: &Issuer<'static, KeyPair>, user: &str, groups: &[&str]) -> (String, String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, user);
    for group in groups {
        params.distinguished_name.push(DnType::OrganizationName, *group);
    }
    params.subject_alt_names.push(SanType::IpAddress(Ipv4Addr::LOCALHOST.into()));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    let certificate = params.signed_by(&key, authority).unwrap();
    (certificate.pem(), key.serialize_pem())
}

impl Cluster {
    pub fn start() -> Self {
        Self::with(Vec::new())
    }

    pub fn with(admission: Vec<Arc<dyn Admission>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.path().join("ca.crt"), certificate.pem()).unwrap();
        let authority = Issuer::new(params, key);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let mut cluster = Self { folder, address, stop: None, thread: None, authority };
        let tls = cluster.files("server", "kube-apiserver", &["system:masters"]);
        cluster.files("admin", "kubernetes-admin", &["system:masters"]);
        cluster.kubeconfig("admin");
        let store = Store::open(cluster.folder.path().join("store.redb")).unwrap();
        let (stop, stopped) = oneshot::channel();
        let options = Options {
            store,
            listeners: vec![listener],
            kubelet_client: Some(tls.clone()),
            tls,
            admission,
            actions: Vec::new(),
            dialer: Arc::new(DirectDialer),
            roles: Vec::new(),
        };
        cluster.stop = Some(stop);
        cluster.thread = Some(std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(serve(options, async { drop(stopped.await) })).unwrap();
        }));
        cluster
    }

    /// Makes a certificate pair for a user.
    pub fn files(&self, file: &str, user: &str, groups: &[&str]) -> TlsFiles {
        let (cert, key) = client_pair(&self.authority, user, groups);
        let path = |ending: &str| self.folder.path().join(format!("{file}.{ending}"));
        std::fs::write(path("crt"), cert).unwrap();
        std::fs::write(path("key"), key).unwrap();
        TlsFiles { ca: self.folder.path().join("ca.crt"), cert: path("crt"), key: path("key") }
    }

    /// Writes a kubeconfig that uses the pair of this name.
    pub fn kubeconfig(&self, file: &str) -> PathBuf {
        let path = self.folder.path().join(format!("{file}.kubeconfig"));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters:\n- name: x\n  cluster:\n    server: https://{}\n    \
             certificate-authority: ca.crt\nusers:\n- name: x\n  user:\n    client-certificate: {file}.crt\n    \
             client-key: {file}.key\ncontexts:\n- name: x\n  context:\n    cluster: x\n    user: x\n",
            self.address
        );
        std::fs::write(&path, text).unwrap();
        path
    }

    /// A kubectl of this version as the administrator; none (with the reason printed) if it is not installed.
    pub fn kubectl(&self, version: &str) -> Option<Kubectl> {
        let program = PathBuf::from(format!("/usr/lib/google-cloud-sdk/bin/kubectl.{version}"));
        if !program.exists() {
            eprintln!("skipped: {} is not installed", program.display());
            return None;
        }
        Some(Kubectl {
            program,
            config: self.folder.path().join("admin.kubeconfig"),
            cache: self.folder.path().join(format!("cache-{version}")),
            version: version.to_owned(),
        })
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap();
            }
        }
    }
}

/// A real kubectl.
pub struct Kubectl {
    pub program: PathBuf,
    pub config: PathBuf,
    pub cache: PathBuf,
    pub version: String,
}

impl Kubectl {
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env_clear().env("HOME", &self.cache).env("KUBECONFIG", &self.config);
        command.arg("--cache-dir").arg(&self.cache);
        command
    }

    /// Runs it with this input; output and whether it succeeded.
    pub fn run(&self, args: &[&str], input: &str) -> Output {
        use std::io::Write;
        let mut command = self.command(args);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kubectl starts");
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Output of a command that must succeed.
    #[track_caller]
    pub fn good(&self, args: &[&str], input: &str) -> String {
        let output = self.run(args, input);
        let out = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {} {}:\n{out}{errors}", self.version, args.join(" "));
        out + &errors
    }

    /// What a command that must fail says.
    #[track_caller]
    pub fn bad(&self, args: &[&str], input: &str) -> String {
        let output = self.run(args, input);
        let out = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "kubectl {} {} should have failed:\n{out}", self.version, args.join(" "));
        out
    }
}

/// Where test data may be written.
pub fn write(folder: &Path, name: &str, text: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}
