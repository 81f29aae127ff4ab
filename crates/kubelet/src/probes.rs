//! Probes of containers over the network: `tcpSocket` and `httpGet`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A probe that this kubelet can carry out.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    address: SocketAddr,
    request: Option<String>,
    pub(crate) initial_delay: Duration,
    pub(crate) period: Duration,
    timeout: Duration,
    pub(crate) success_threshold: u32,
    pub(crate) failure_threshold: u32,
}

impl Check {
    /// `Err` names what is not supported.
    pub(crate) fn new(probe: &Probe, container: &Container, pod_ip: IpAddr) -> Result<Self, String> {
        let (host, port, request) = if let Some(tcp) = &probe.tcp_socket {
            (tcp.host.as_deref(), &tcp.port, None)
        } else if let Some(http) = &probe.http_get {
            if http.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
                return Err("httpGet probes over HTTPS".into());
            }
            let headers: String = http
                .http_headers
                .iter()
                .flatten()
                .filter(|header| !header.name.eq_ignore_ascii_case("host"))
                .map(|header| format!("{}: {}\r\n", header.name, header.value))
                .collect();
            let own_host = http.http_headers.iter().flatten().find(|h| h.name.eq_ignore_ascii_case("host"));
            let host = own_host.map_or_else(|| pod_ip.to_string(), |header| header.value.clone());
            let path = http.path.as_deref().unwrap_or("/");
            let line = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: kube-probe/1.33\r\n");
            (http.host.as_deref(), &http.port, Some(format!("{line}{headers}Accept: */*\r\nConnection: close\r\n\r\n")))
        } else {
            return Err("exec and gRPC probes".into());
        };
        let port = port_number(port, container).ok_or("a probe of an unknown port")?;
        let host = match host.filter(|host| !host.is_empty()) {
            Some(host) => host.parse().map_err(|_| "probes of a host given by name".to_owned())?,
            None => pod_ip,
        };
        let seconds = |value: Option<i32>, default: u64| {
            Duration::from_secs(value.and_then(|value| u64::try_from(value).ok()).unwrap_or(default))
        };
        let count = |value: Option<i32>, default: u32| {
            value.and_then(|value| u32::try_from(value).ok()).filter(|value| *value > 0).unwrap_or(default)
        };
        Ok(Self {
            address: SocketAddr::new(host, port),
            request,
            initial_delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
            success_threshold: count(probe.success_threshold, 1),
            failure_threshold: count(probe.failure_threshold, 3),
        })
    }

    /// Once; `Err` says why not.
    pub(crate) async fn once(&self) -> Result<(), String> {
        match tokio::time::timeout(self.timeout, self.attempt()).await {
            Ok(result) => result,
            Err(_) => Err(format!("no answer from {} in {} s", self.address, self.timeout.as_secs())),
        }
    }

    async fn attempt(&self) -> Result<(), String> {
        let failed = |e: std::io::Error| format!("{}: {e}", self.address);
        let mut stream = TcpStream::connect(self.address).await.map_err(failed)?;
        let Some(request) = &self.request else { return Ok(()) };
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        let mut answer = Vec::new();
        // The first line is enough; how the connection ends after it does not matter.
        let read = stream.take(64).read_to_end(&mut answer).await;
        if answer.is_empty() {
            read.map_err(failed)?;
        }
        let line = String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned();
        match line.split(' ').nth(1).and_then(|code| code.parse::<u16>().ok()) {
            Some(200..=399) => Ok(()),
            Some(code) => Err(format!("HTTP probe failed with statuscode: {code}")),
            None => Err(format!("{} does not speak HTTP", self.address)),
        }
    }
}

fn port_number(port: &IntOrString, container: &Container) -> Option<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let port = ports.find(|port| port.name.as_ref() == Some(name)).map(|port| port.container_port);
            port.and_then(|port| u16::try_from(port).ok()).or_else(|| name.parse().ok())
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{ExecAction, HTTPGetAction, TCPSocketAction};

    use super::*;

    #[tokio::test]
    async fn answers_are_judged() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = i32::from(listener.local_addr().unwrap().port());
        let server = tokio::spawn(async move {
            for answer in ["", "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 503 Service Unavailable\r\n\r\n"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                if !answer.is_empty() {
                    let mut request = [0; 1024];
                    assert!(stream.read(&mut request).await.unwrap() > 16);
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        let ip = "127.0.0.1".parse().unwrap();
        let tcp = TCPSocketAction { port: IntOrString::Int(port), host: None };
        let tcp = Probe { tcp_socket: Some(tcp), ..Probe::default() };
        let http = HTTPGetAction { port: IntOrString::Int(port), ..HTTPGetAction::default() };
        let http = Probe { http_get: Some(http), ..Probe::default() };
        let check = |probe: &Probe| Check::new(probe, &Container::default(), ip).unwrap();
        assert!(check(&tcp).once().await.is_ok());
        assert!(check(&http).once().await.is_ok());
        assert!(check(&http).once().await.unwrap_err().contains("503"));
        server.await.unwrap();
        assert!(check(&tcp).once().await.is_err());
        let exec = Probe { exec: Some(ExecAction::default()), ..Probe::default() };
        assert!(Check::new(&exec, &Container::default(), ip).is_err());
    }
}
