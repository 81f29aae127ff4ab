//! A picture of each line: dirty rate, bandwidth and what remained over time, one curve a way.

use super::figures::{Figures, Sample};
use super::report::{Entry, Report};
use super::{Line, Way};
use std::fmt::Write;

const MIB: f64 = 1024.0 * 1024.0;
const WIDTH: f64 = 760.0;
const PANEL: f64 = 170.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 48.0;
const GAP: f64 = 44.0;

/// One SVG for each line, with a name for its file.
pub fn plots(report: &Report) -> Vec<(String, String)> {
    let mut lines: Vec<Line> = Vec::new();
    for entry in &report.entries {
        if !lines.contains(&entry.line) {
            lines.push(entry.line);
        }
    }
    let of = |line: &Line| report.entries.iter().filter(|entry| entry.line == *line).collect::<Vec<_>>();
    lines.iter().map(|line| (format!("{}.svg", line.slug()), svg(line, &of(line)))).collect()
}

/// The run with the middle transfer time; of runs that did not move, the first.
fn typical(entry: &Entry) -> Option<&Figures> {
    let mut moved: Vec<&Figures> = entry.runs.iter().filter(|run| run.failure.is_none()).collect();
    moved.sort_by(|a, b| a.transfer_ms.unwrap_or_default().total_cmp(&b.transfer_ms.unwrap_or_default()));
    moved.get(moved.len().saturating_sub(1) / 2).copied().or(entry.runs.first())
}

/// A curve: milliseconds and MiB or MiB/s.
type Curve = Vec<(f64, f64)>;

fn dirty(samples: &[Sample]) -> Curve {
    samples.iter().map(|s| (s.at_ms, s.dirty_bytes_per_second as f64 / MIB)).collect()
}

fn remaining(samples: &[Sample]) -> Curve {
    samples.iter().map(|s| (s.at_ms, s.remaining_bytes as f64 / MIB)).collect()
}

/// What was sent between two looks, by the time between them; a step for each.
fn bandwidth(samples: &[Sample]) -> Curve {
    let mut curve = Curve::new();
    for pair in samples.windows(2) {
        let [before, after] = pair else { continue };
        let ms = after.at_ms - before.at_ms;
        // Looks that are close together measure the buffers.
        if ms < 1.0 {
            continue;
        }
        let rate = after.sent_bytes.saturating_sub(before.sent_bytes) as f64 / MIB / ms * 1e3;
        curve.extend([(before.at_ms, rate), (after.at_ms, rate)]);
    }
    curve
}

fn colour(way: Way) -> &'static str {
    match way {
        Way::Ours => "#0b6e4f",
        Way::BareDefault => "#c1440e",
        Way::BareBest => "#1f4e9e",
        Way::BareTls => "#6b8fd6",
        Way::Virsh => "#7a5195",
    }
}

fn svg(line: &Line, entries: &[&Entry]) -> String {
    let runs: Vec<(Way, &Figures)> = entries.iter().filter_map(|e| Some((e.way, typical(e)?))).collect();
    let height = TOP + 3.0 * (PANEL + GAP);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-size=\"14\">{line}</text>\n"
    );
    let mut x = LEFT;
    for (way, _) in &runs {
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"27\" width=\"12\" height=\"4\" fill=\"{}\"/><text x=\"{}\" y=\"33\">{}</text>",
            colour(*way),
            x + 16.0,
            way.name()
        );
        x += 110.0;
    }
    let end = most(runs.iter().flat_map(|(_, run)| run.samples.iter().map(|s| s.at_ms)));
    type Figure = fn(&[Sample]) -> Curve;
    let panels: [(&str, Figure); 3] =
        [("dirty rate, MiB/s", dirty), ("bandwidth, MiB/s", bandwidth), ("remaining, MiB", remaining)];
    for (number, (title, figure)) in panels.into_iter().enumerate() {
        let top = TOP + number as f64 * (PANEL + GAP);
        let curves: Vec<(Way, Curve)> = runs.iter().map(|(way, run)| (*way, figure(&run.samples))).collect();
        panel(&mut out, top, title, end, &curves);
    }
    out + "</svg>\n"
}

fn panel(out: &mut String, top: f64, title: &str, end_ms: f64, curves: &[(Way, Curve)]) {
    let high = most(curves.iter().flat_map(|(_, curve)| curve.iter().map(|(_, y)| *y)));
    let (width, bottom) = (WIDTH - LEFT - RIGHT, top + PANEL);
    let place = |(x, y): (f64, f64)| (LEFT + x.max(0.0) / end_ms * width, bottom - y / high * PANEL);
    let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"{:.0}\">{title}</text>", top - 4.0);
    for part in 0..=4 {
        let (x, y) = place((end_ms * f64::from(part) / 4.0, high * f64::from(part) / 4.0));
        let _ = writeln!(
            out,
            "<path d=\"M{LEFT} {y:.1}H{:.1}\" stroke=\"#ddd\"/><text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{:.2} s</text>",
            LEFT + width,
            LEFT - 6.0,
            y + 4.0,
            tick(high * f64::from(part) / 4.0),
            bottom + 14.0,
            end_ms * f64::from(part) / 4.0 / 1e3,
        );
    }
    for (way, curve) in curves {
        let points: Vec<String> =
            curve.iter().map(|point| place(*point)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\"/>",
            points.join(" "),
            colour(*way)
        );
    }
}

/// The largest, and at least something to divide by.
fn most(numbers: impl Iterator<Item = f64>) -> f64 {
    let most = numbers.filter(|n| n.is_finite()).fold(0.0, f64::max);
    if most > 0.0 { most } else { 1.0 }
}

fn tick(value: f64) -> String {
    if value >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at_ms: f64, sent_mib: u64, remaining_mib: u64) -> Sample {
        Sample {
            at_ms,
            sent_bytes: sent_mib << 20,
            remaining_bytes: remaining_mib << 20,
            dirty_bytes_per_second: 1 << 20,
        }
    }

    #[test]
    fn bandwidth_is_what_went_between_two_looks() {
        let samples = [sample(0.0, 0, 30), sample(100.0, 10, 20), sample(100.2, 10, 20), sample(300.2, 30, 0)];
        let curve = bandwidth(&samples);
        assert_eq!(curve, [(0.0, 100.0), (100.0, 100.0), (100.2, 100.0), (300.2, 100.0)]);
    }

    #[test]
    fn the_picture_holds_a_curve_for_each_way_within_its_frame() {
        let line =
            Line { memory: "512Mi".parse().unwrap(), load: "50%".parse().unwrap(), bandwidth: "64Mi".parse().unwrap() };
        let run = Figures { samples: vec![sample(0.0, 0, 64), sample(1000.0, 64, 0)], ..Figures::default() };
        let entry = |way| Entry { line, way, runs: vec![run.clone()] };
        let (ours, bare) = (entry(Way::Ours), entry(Way::BareBest));
        let empty = Entry { line, way: Way::BareDefault, runs: Vec::new() };
        let picture = svg(&line, &[&ours, &bare, &empty]);
        assert_eq!(picture.matches("<polyline").count(), 6);
        assert!(picture.contains("512Mi, 50%, 64Mi/s"));
        for pair in picture.split("points=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            for point in pair.split(' ').filter(|point| !point.is_empty()) {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((0.0..=WIDTH).contains(&x) && y >= TOP - 0.1, "{point}");
            }
        }
        assert_eq!(svg(&line, &[]).matches("<svg").count(), 1, "nothing to show is no error");
    }
}
