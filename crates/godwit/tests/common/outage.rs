//! The control plane taken away, and brought back with whatever else of the cluster does not run.

use super::real::{API, API_SERVER, CONTROLLER};
use super::stopped::Stopped;
use super::{Cluster, kill_hard, text};
use std::time::{Duration, Instant};

impl Cluster {
    /// The processes without which nothing is decided and nothing is written.
    fn control_plane(&self) -> &'static [&'static str] {
        match self.real {
            Some(_) => &[API_SERVER, CONTROLLER],
            None => &["control-plane"],
        }
    }

    /// `kill -9` of the API server and of the controllers.
    pub fn kill_control_plane(&self) {
        self.control_plane().iter().for_each(|process| kill_hard(self.pid(process)));
    }

    /// Makes them stand still until this is dropped. [`Self::reconnect`] then.
    pub fn stop_control_plane(&self) -> Vec<Stopped> {
        self.control_plane().iter().map(|process| Stopped::stop(self.pid(process))).collect()
    }

    /// Opens connections anew, which either end may have given up, and waits until the API answers on them.
    pub async fn reconnect(&mut self) {
        self.client = godwit_standalone::client(&self.kubeconfig()).await.expect("client");
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.client.apiserver_version().await.is_err() {
            assert!(Instant::now() < deadline, "the API does not answer again\n{}", self.words());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts again what of the cluster does not run.
    pub async fn up_again(&mut self, nodes: usize) {
        if let Some(real) = &self.real {
            return real.start_missing(&self.client).await;
        }
        let output = self.godwit(&["up", "--nodes", &nodes.to_string(), "--detach"]);
        assert!(output.status.success(), "godwit up: {}", text(&output.stderr));
        // It may listen on another port.
        self.client = godwit_standalone::client(&self.kubeconfig()).await.expect("client");
    }

    /// The log of the process that opens consoles and screens.
    pub fn log_of_streams(&self) -> String {
        let process = if self.real.is_some() { API } else { "control-plane" };
        std::fs::read_to_string(self.data_dir().join(format!("log/{process}.log"))).expect("the log")
    }
}
