//! String formats of OpenAPI that Kubernetes checks; unknown formats constrain nothing.

use base64::Engine as _;

/// Whether `s` is of the format.
pub(super) fn matches(format: &str, s: &str) -> bool {
    match format {
        "date-time" | "datetime" => s.parse::<jiff::Timestamp>().is_ok(),
        "date" => s.parse::<jiff::civil::Date>().is_ok(),
        "byte" => base64::engine::general_purpose::STANDARD.decode(s).is_ok(),
        "ipv4" => s.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => s.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => cidr(s),
        "mac" => mac(s),
        "uuid" => uuid(s),
        "duration" => duration(s),
        _ => true,
    }
}

fn cidr(s: &str) -> bool {
    let Some((address, bits)) = s.split_once('/') else { return false };
    let most = match address.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(_)) => 32,
        Ok(std::net::IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    bits.parse::<u8>().is_ok_and(|bits| bits <= most)
}

fn mac(s: &str) -> bool {
    let separator = if s.contains('-') { '-' } else { ':' };
    let parts: Vec<&str> = s.split(separator).collect();
    matches!(parts.len(), 6 | 8 | 20) && parts.iter().all(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn uuid(s: &str) -> bool {
    let digits: String = s.chars().filter(|c| *c != '-').collect();
    digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Go's durations: `300ms`, `-1.5h`, `2h45m`, and plain `0`.
fn duration(s: &str) -> bool {
    let s = s.strip_prefix(['-', '+']).unwrap_or(s);
    if s == "0" {
        return true;
    }
    let mut rest = s;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').len();
        let unit_and_more = &rest[digits..];
        let Some(unit) = ["ns", "us", "µs", "ms", "s", "m", "h"].iter().find(|u| {
            // `m` must not swallow the head of `ms`.
            unit_and_more.starts_with(**u) && !(**u == "m" && unit_and_more.starts_with("ms"))
        }) else {
            return false;
        };
        if rest[..digits].parse::<f64>().is_err() {
            return false;
        }
        rest = &unit_and_more[unit.len()..];
    }
    !s.is_empty()
}
