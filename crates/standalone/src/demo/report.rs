//! What the demo saw, in a few lines, and whether it is good enough.

use super::guest::Facts;
use super::journey::Travelled;
use crate::Error;
use godwit_network::pinger::Report as Pings;

/// Prints the report.
///
/// # Errors
/// [`Error::Demo`] naming everything that shows that the guest did not simply run on.
pub fn print_and_judge(
    travelled: &Travelled,
    before: &Facts,
    after: Option<&Facts>,
    pings: &Pings,
) -> Result<(), Error> {
    let number = |name: &str| travelled.state.pointer(&format!("/progress/{name}")).and_then(serde_json::Value::as_u64);
    let shown =
        |value: Option<u64>, unit: &str| value.map_or_else(|| "not reported".to_owned(), |v| format!("{v} {unit}"));
    println!();
    println!("node       {} → {}", travelled.from, travelled.to);
    println!("address    {} → {}", travelled.addresses.0, travelled.addresses.1);
    let mut phases = Vec::new();
    for (phase, at) in &travelled.phases {
        phases.push(format!("{phase} {:.0} ms", at.as_secs_f64() * 1e3));
    }
    println!("phases     {}", phases.join(" · "));
    println!(
        "memory     {} sent in {}",
        shown(number("bytesProcessed").map(|b| b >> 20), "MiB"),
        shown(number("totalMilliseconds"), "ms")
    );
    println!(
        "downtime   {} by QEMU's count, {} from STOP on the source to RESUME on the target",
        shown(number("qemuDowntimeMilliseconds"), "ms"),
        shown(number("downtimeMilliseconds"), "ms")
    );
    println!(
        "pings      {} sent, {} lost, longest gap {:.0} ms",
        pings.sent,
        pings.lost,
        pings.longest_gap_us as f64 / 1e3
    );
    let mut wrong = Vec::new();
    if travelled.from == travelled.to || travelled.to.is_empty() {
        wrong.push(format!("it is still on {}", travelled.to));
    }
    match after {
        None => wrong.push("it does not answer any more".to_owned()),
        Some(after) => {
            println!("uptime     {:.1} s → {:.1} s", seconds(before), seconds(after));
            println!(
                "checksum   {} → {}, {} pages verified, {} damaged",
                before.checksum, after.checksum, after.verified_pages, after.corrupt_pages
            );
            if before.token != after.token {
                wrong.push("it was started anew: its boot token changed".to_owned());
            }
            if after.uptime_milliseconds <= before.uptime_milliseconds || after.beat < before.beat {
                wrong.push("its clock went back".to_owned());
            }
            if before.checksum != after.checksum || after.corrupt_pages > 0 {
                wrong.push("its memory is damaged".to_owned());
            }
            if after.verified_pages <= before.verified_pages {
                wrong.push("it stopped working on its memory".to_owned());
            }
        }
    }
    if wrong.is_empty() {
        println!("\nThe guest ran on without a restart.");
        Ok(())
    } else {
        Err(Error::Demo(format!("the guest did not simply run on: {}", wrong.join("; "))))
    }
}

fn seconds(facts: &Facts) -> f64 {
    facts.uptime_milliseconds as f64 / 1e3
}
