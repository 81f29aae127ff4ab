//! The `godwit` binary: argument parsing and wiring, nothing else.

mod actions;
mod admission;
mod api;
mod args;
mod bench;
mod connect;
mod control_plane;
mod controller;
mod drain;
mod footprint;
mod handler;
mod health;
mod images;
mod metrics;
mod node;
mod shutdown;
mod simulate;
mod webhook;

use anyhow::Context;
use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    // One TLS provider for the whole tree; the second call would only say that there is one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match run(args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("godwit: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Shim(shim) => return Ok(godwit_kubelet::shim::main(&shim.arguments)),
        Command::Probe(probe) => return health::probe(&probe.socket, &probe.path).map(|()| ExitCode::SUCCESS),
        Command::Launcher(launcher) => {
            log_to_stderr();
            return one_thread()?
                .block_on(godwit_launcher::run(launcher.into()))
                .map(|()| ExitCode::SUCCESS)
                .context("launcher");
        }
        Command::Attachment(attachment) => {
            log_to_stderr();
            let sockets = godwit_launcher::rpc::Paths::default().sockets;
            return one_thread()?
                .block_on(godwit_launcher::attachment::run(attachment.volumes, &sockets))
                .map(|()| ExitCode::SUCCESS)
                .context("attachment");
        }
        Command::Node(ref node) => {
            log_to_stderr();
            return node::run(node).map(|()| ExitCode::SUCCESS);
        }
        Command::Controller(controller) => {
            log_to_stderr();
            // Decisions are made one after another. One thread has one heap, in which nothing is kept twice.
            return one_thread()?.block_on(controller::run(controller)).map(|()| ExitCode::SUCCESS);
        }
        Command::Simulate(ref wanted) => return simulate::run(wanted),
        Command::Manifests(wanted) => {
            let parts = godwit_manifests::parts(&wanted.into())?;
            print!("{}", godwit_manifests::documents(parts.iter().flat_map(|part| &part.objects)));
            return Ok(ExitCode::SUCCESS);
        }
        Command::ControlPlane(ref plane) => {
            log_to_stderr();
            return control_plane::run(plane).map(|()| ExitCode::SUCCESS);
        }
        _ => {}
    }
    let runtime = many_threads()?;
    match args.command {
        Command::Up(up) => runtime.block_on(cluster_up(&up))?,
        Command::Down(down) => {
            let was_up = godwit_standalone::down(&down.data_dir)?;
            println!("{}", if was_up { "down; the data stays" } else { "nothing was up" });
        }
        Command::Status(status) => {
            let report = runtime.block_on(godwit_standalone::status(&status.data_dir))?;
            match status.output {
                args::Output::Text => print!("{report}"),
                args::Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
            }
        }
        Command::Demo(demo) => runtime.block_on(godwit_standalone::demo::demo(&demo.into()))?,
        Command::Image(image) => runtime.block_on(images::run(image))?,
        Command::Bench(wanted) => return runtime.block_on(bench::run(wanted)),
        Command::Plan(args::Plan::Drain(wanted)) => return runtime.block_on(drain::plan(wanted)),
        Command::Drain(wanted) => return runtime.block_on(drain::run(wanted)),
        Command::Handler(arguments) => {
            log_to_stderr();
            runtime.block_on(handler::run(arguments))?;
        }
        Command::Api(arguments) => {
            log_to_stderr();
            runtime.block_on(api::run(arguments))?;
        }
        Command::Webhook(arguments) => {
            log_to_stderr();
            runtime.block_on(webhook::run(arguments))?;
        }
        Command::Shim(_)
        | Command::Probe(_)
        | Command::Launcher(_)
        | Command::Attachment(_)
        | Command::Controller(_)
        | Command::Node(_)
        | Command::ControlPlane(_)
        | Command::Manifests(_)
        | Command::Simulate(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn cluster_up(up: &args::Up) -> anyhow::Result<()> {
    let cluster = godwit_standalone::up(&up.into()).await?;
    println!("ready after {:.2} s: {}", cluster.took.as_secs_f64(), cluster.cluster.nodes.join(" "));
    for offer in godwit_standalone::offers(&cluster).await? {
        println!("guests are executed by {offer}");
    }
    println!("export KUBECONFIG={}", cluster.layout.kubeconfig().display());
    if up.detach {
        return Ok(());
    }
    println!("Ctrl-C takes it down (with --detach it stays)");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    godwit_standalone::down(&up.data_dir)?;
    println!("down; the data stays in {}", cluster.layout.root().display());
    Ok(())
}

/// kube's client logs every broken connection as an error; whoever made the call tells it with its meaning.
const DEFAULT_LOG: &str = "info,kube=warn,kube_client::client::builder=off,hyper=warn,tower=warn,rustls=warn";

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("GODWIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(DEFAULT_LOG));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

fn one_thread() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")
}

fn many_threads() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the runtime")
}
