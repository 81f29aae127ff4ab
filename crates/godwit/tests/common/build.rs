//! Builds of godwit: the one under test, and an older one that runs beside it.

use super::text;
use godwit_api::names::HOST_IMAGE;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder of the handler's pod, in which its container's socket is.
const SCRATCH: &str = "/tmp/";

/// One build, and what it installs.
#[derive(Clone)]
pub struct Build {
    /// Its binary.
    pub program: PathBuf,
    /// The image of its components and launchers. Our kubelets take it for their node's own system.
    pub image: String,
    /// What it installs, and where.
    pub objects: Vec<Value>,
    namespace: String,
}

impl Build {
    /// The one under test.
    pub fn under_test(namespace: &str) -> Self {
        let options = godwit_manifests::Options { namespace: namespace.to_owned(), ..Default::default() };
        let parts = godwit_manifests::parts(&options).expect("manifests");
        Self {
            program: env!("CARGO_BIN_EXE_godwit").into(),
            image: HOST_IMAGE.to_owned(),
            objects: parts.into_iter().flat_map(|part| part.objects).collect(),
            namespace: namespace.to_owned(),
        }
    }

    /// A build of which nothing is known but what it prints itself; `tag` tells its image from others'.
    pub fn printed_by(program: &Path, namespace: &str, tag: &str) -> Self {
        let mut build = Self {
            program: program.to_owned(),
            image: format!("{HOST_IMAGE}:{tag}"),
            objects: Vec::new(),
            namespace: namespace.to_owned(),
        };
        build.objects = documents(&build.manifests());
        build
    }

    /// The older build that `GODWIT_OLD` names; none, with a line that says so, where it names none.
    pub fn old() -> Option<Self> {
        let Some(program) = std::env::var_os("GODWIT_OLD").map(PathBuf::from) else {
            println!("SKIPPED: GODWIT_OLD names no binary of an older godwit (make test-upgrade builds one)");
            return None;
        };
        assert!(program.is_file(), "GODWIT_OLD={}: there is no such file", program.display());
        Some(Self::printed_by(&program, godwit_api::names::KUBEVIRT_NAMESPACE, "old"))
    }

    /// What `godwit manifests` prints.
    pub fn manifests(&self) -> String {
        let output = self.run(&["manifests", "--namespace", &self.namespace, "--image", &self.image]);
        assert!(output.status.success(), "godwit manifests: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs it.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let output = Command::new(&self.program).args(arguments).output();
        output.unwrap_or_else(|error| panic!("{}: {error}", self.program.display()))
    }

    /// What is installed that is neither a pod's template nor asks for a running `godwit api`.
    pub fn quiet_objects(&self) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(|object| !is_workload(object) && !is_route(object))
    }

    /// By what the API server asks `godwit api`.
    pub fn routes(&self) -> impl Iterator<Item = &Value> {
        self.objects.iter().filter(|object| is_route(object))
    }

    /// The only container of a Deployment or DaemonSet.
    pub fn container(&self, workload: &str) -> &Value {
        let named = |object: &&Value| is_workload(object) && object["metadata"]["name"] == workload;
        let workload = self.objects.iter().find(named).unwrap_or_else(|| panic!("no {workload} is installed"));
        &workload["spec"]["template"]["spec"]["containers"][0]
    }

    /// The command line of that container without its program, with flags of ours, in the place of its own where both have one.
    pub fn arguments(&self, workload: &str, ours: &[String], scratch: &Path) -> Vec<String> {
        let ours_has = |flag: &str| ours.iter().any(|one| name_of(one) == name_of(flag));
        let theirs = words(&self.container(workload)["command"], scratch);
        theirs.into_iter().skip(1).filter(|word| !ours_has(word)).chain(ours.iter().cloned()).collect()
    }
}

/// The words of a command, whose files in the pod's scratch folder are in this one.
pub fn words(command: &Value, scratch: &Path) -> Vec<String> {
    let scratch = format!("{}/", scratch.display());
    let words = command.as_array().expect("a command").iter().filter_map(Value::as_str);
    words.map(|word| word.replace(SCRATCH, &scratch)).collect()
}

fn name_of(flag: &str) -> &str {
    flag.split('=').next().unwrap_or_default()
}

fn is_workload(object: &Value) -> bool {
    ["Deployment", "DaemonSet"].contains(&object["kind"].as_str().unwrap_or_default())
}

fn is_route(object: &Value) -> bool {
    let kinds = ["APIService", "ValidatingWebhookConfiguration", "MutatingWebhookConfiguration"];
    kinds.contains(&object["kind"].as_str().unwrap_or_default())
}

/// The documents of a YAML stream.
pub fn documents(text: &str) -> Vec<Value> {
    let documents = text.split("\n---\n").map(|document| document.trim_start_matches("---\n"));
    documents.map(|document| serde_saphyr::from_str(document).unwrap_or_else(|e| panic!("{e}: {document}"))).collect()
}
