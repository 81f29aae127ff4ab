//! Figures as Prometheus reads them.

use godwit_api::metrics::Figures;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// Of [`text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The version of this binary, as `kubevirt_info` has it.
pub const VERSION: &str = concat!("v", env!("CARGO_PKG_VERSION"));

/// Figures in the text format of OpenMetrics.
pub fn text(figures: Figures) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Told(figures)));
    let mut text = String::new();
    // A String takes everything.
    let _ = encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Told(Figures);

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (metric, all) in self.0.families() {
            let help = format!("{}.", metric.help);
            let mut family = encoder.encode_descriptor(metric.name, &help, None, MetricType::Gauge)?;
            for series in all {
                let values = series.labels.iter().map(String::as_str);
                let labels: Vec<(&str, &str)> = metric.labels.iter().copied().zip(values).collect();
                match labels.is_empty() {
                    true => family.encode_gauge(&series.value)?,
                    false => family.encode_family(&labels)?.encode_gauge(&series.value)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_api::metrics::{ALL, INFO, MIGRATION_END, MIGRATIONS_PENDING, VMI_PHASES};

    #[test]
    fn each_metric_is_told_under_its_name_with_its_labels() {
        let mut figures = Figures::default();
        for metric in ALL {
            match metric.labels.len() {
                0 => figures.tell(*metric, [], 1.0),
                1 => figures.tell(*metric, ["a"], 1.0),
                2 => figures.tell(*metric, ["a", "b"], 1.0),
                3 => figures.tell(*metric, ["a", "b", "c"], 1.0),
                4 => figures.tell(*metric, ["a", "b", "c", "d"], 1.0),
                5 => figures.tell(*metric, ["a", "b", "c", "d", "e"], 1.0),
                _ => panic!("{}: so many labels", metric.name),
            }
        }
        let told = text(figures);
        for metric in ALL {
            let values = ["a", "b", "c", "d", "e"];
            let labels: Vec<String> =
                metric.labels.iter().zip(values).map(|(label, value)| format!("{label}=\"{value}\"")).collect();
            let series = match labels.is_empty() {
                true => format!("{} 1.0", metric.name),
                false => format!("{}{{{}}} 1.0", metric.name, labels.join(",")),
            };
            assert!(told.lines().any(|line| line == series), "{series}\n{told}");
            assert!(told.contains(&format!("# TYPE {} gauge\n", metric.name)), "{}", metric.name);
            assert!(told.contains(&format!("# HELP {} {}.\n", metric.name, metric.help)), "{}", metric.name);
        }
        assert!(told.ends_with("# EOF\n"), "{told}");
        assert_eq!(told.lines().filter(|line| !line.starts_with('#')).count(), ALL.len());
    }

    #[test]
    fn values_and_labels_are_as_they_were() {
        let mut figures = Figures::default();
        figures.tell(INFO, [VERSION], 1.0);
        figures.tell(MIGRATION_END, ["n", "ns", "a \"vm\"\\", "m", "failed"], 1_800_000_003.0);
        figures.tell(VMI_PHASES, ["", "pending"], 2.0);
        figures.tell(MIGRATIONS_PENDING, [], 0.0);
        let told = text(figures);
        for line in [
            concat!("kubevirt_info{kubeversion=\"v", env!("CARGO_PKG_VERSION"), "\"} 1.0"),
            r#"kubevirt_vmi_migration_end_time_seconds{node="n",namespace="ns",name="a \"vm\"\\",migration_name="m",status="failed"} 1800000003.0"#,
            r#"kubevirt_vmi_phase_count{node="",phase="pending"} 2.0"#,
            "kubevirt_vmi_migrations_in_pending_phase 0.0",
        ] {
            assert!(told.lines().any(|one| one == line), "{line}\n{told}");
        }
    }
}
