//! Kubernetes quantities: `500m`, `1.5Gi`, `64e3`; exact, no floating point.

use serde_json::Value;
use std::cmp::Ordering;

/// What Kubernetes says to a string that is not a quantity.
pub const SYNTAX: &str = "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// Nanos in one: amounts are kept in units of 10⁻⁹, as finely as Kubernetes does.
const NANO: i128 = 1_000_000_000;
/// Kubernetes caps at 2⁶³−1 whole units.
const MAX: i128 = i64::MAX as i128 * NANO;

/// How the number was written, and hence how it is written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `Ki`, `Mi` … powers of 1024.
    BinarySi,
    /// `m`, `k`, `M` … powers of 1000.
    DecimalSi,
    /// `e3`, `E6` …
    DecimalExponent,
}

/// An amount, exact to 10⁻⁹ (rounded up beyond that, as Kubernetes does).
#[derive(Debug, Clone, Copy)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    /// So many whole units, such as bytes.
    pub fn new(units: i64, format: Format) -> Quantity {
        Quantity { nanos: i128::from(units) * NANO, format }
    }

    /// Reads the text of a quantity; `None` if it is none.
    pub fn parse(text: &str) -> Option<Quantity> {
        let (negative, unsigned) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let digits = unsigned.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let (number, suffix) = unsigned.split_at(digits);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
            return None;
        }
        let (format, scale) = suffix_scale(suffix)?;
        let nanos = scaled(whole, fraction, scale).min(MAX);
        Some(Quantity { nanos: if negative { -nanos } else { nanos }, format })
    }

    /// Reads a quantity field: a string, or a plain number.
    pub fn of(value: &Value) -> Option<Quantity> {
        match value {
            Value::String(s) => Quantity::parse(s),
            Value::Number(n) => Quantity::parse(&n.to_string()),
            _ => None,
        }
    }

    /// Whole units, rounded up (bytes, counts).
    pub fn units(&self) -> i64 {
        i64::try_from(div_up(self.nanos, NANO)).unwrap_or(i64::MAX)
    }

    /// Thousandths, rounded up (CPU).
    pub fn milli(&self) -> i64 {
        i64::try_from(div_up(self.nanos, NANO / 1000)).unwrap_or(i64::MAX)
    }

    /// Neither more nor less than nothing.
    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// Sum, capped; keeps the left format, as Kubernetes does (an empty left side takes the right one's).
    #[must_use]
    pub fn plus(self, other: Quantity) -> Quantity {
        let format = if self.nanos == 0 { other.format } else { self.format };
        Quantity { nanos: (self.nanos + other.nanos).clamp(-MAX, MAX), format }
    }

    /// Difference, capped.
    #[must_use]
    pub fn minus(self, other: Quantity) -> Quantity {
        self.plus(Quantity { nanos: -other.nanos, format: other.format })
    }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}
impl Eq for Quantity {}
impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl std::str::FromStr for Quantity {
    type Err = &'static str;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Quantity::parse(s).ok_or(SYNTAX)
    }
}

impl std::fmt::Display for Quantity {
    /// The canonical form: no fraction, the largest suffix that loses nothing.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        // Less than one, or a fraction, cannot be written with binary suffixes.
        if self.format == Format::BinarySi && self.nanos % NANO == 0 && self.nanos.abs() >= 1024 * NANO {
            let mut n = self.nanos / NANO;
            let mut suffix = "";
            for next in ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"] {
                if n % 1024 != 0 {
                    break;
                }
                n /= 1024;
                suffix = next;
            }
            return write!(f, "{n}{suffix}");
        }
        let mut n = self.nanos;
        let mut exponent = -9i32;
        while n % 1000 == 0 && exponent < 18 {
            n /= 1000;
            exponent += 3;
        }
        match (self.format, exponent) {
            (_, 0) => write!(f, "{n}"),
            (Format::DecimalExponent, _) => write!(f, "{n}e{exponent}"),
            _ => {
                let suffix = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
                let at = usize::try_from((exponent + 9) / 3).unwrap_or(3);
                write!(f, "{n}{}", suffix.get(at).unwrap_or(&""))
            }
        }
    }
}

/// The canonical text of a quantity, as an API server stores it; `None` if it is not one.
pub fn canonical(text: &str) -> Option<String> {
    Quantity::parse(text).map(|q| q.to_string())
}

enum Scale {
    Ten(i32),
    Two(u32),
}

fn suffix_scale(suffix: &str) -> Option<(Format, Scale)> {
    Some(match suffix {
        "Ki" => (Format::BinarySi, Scale::Two(10)),
        "Mi" => (Format::BinarySi, Scale::Two(20)),
        "Gi" => (Format::BinarySi, Scale::Two(30)),
        "Ti" => (Format::BinarySi, Scale::Two(40)),
        "Pi" => (Format::BinarySi, Scale::Two(50)),
        "Ei" => (Format::BinarySi, Scale::Two(60)),
        "n" => (Format::DecimalSi, Scale::Ten(-9)),
        "u" => (Format::DecimalSi, Scale::Ten(-6)),
        "m" => (Format::DecimalSi, Scale::Ten(-3)),
        "" => (Format::DecimalSi, Scale::Ten(0)),
        "k" => (Format::DecimalSi, Scale::Ten(3)),
        "M" => (Format::DecimalSi, Scale::Ten(6)),
        "G" => (Format::DecimalSi, Scale::Ten(9)),
        "T" => (Format::DecimalSi, Scale::Ten(12)),
        "P" => (Format::DecimalSi, Scale::Ten(15)),
        "E" => (Format::DecimalSi, Scale::Ten(18)),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            (Format::DecimalExponent, Scale::Ten(exponent))
        }
    })
}

/// `whole.fraction` times the scale in nanos, rounded up, capped at [`MAX`].
fn scaled(whole: &str, fraction: &str, scale: Scale) -> i128 {
    // Leading zeros carry nothing; more than 28 significant whole digits are beyond the cap for every scale but tiny
    // exponents, where the decimal point is moved instead of multiplying.
    let whole = whole.trim_start_matches('0');
    let mut digits: Vec<u8> = whole.bytes().chain(fraction.bytes()).map(|b| b - b'0').collect();
    let mut point = whole.len() as i64;
    let factor: i128 = match scale {
        Scale::Ten(e) => {
            point += i64::from(e);
            1
        }
        Scale::Two(bits) => 1i128 << bits,
    };
    point += 9;
    if digits.iter().all(|d| *d == 0) {
        return 0;
    }
    if factor > 1 {
        // Multiply the digits by the factor exactly, in decimal.
        let mut carry: i128 = 0;
        for digit in digits.iter_mut().rev() {
            let n = i128::from(*digit) * factor + carry;
            *digit = u8::try_from(n % 10).unwrap_or(0);
            carry = n / 10;
        }
        while carry > 0 {
            digits.insert(0, u8::try_from(carry % 10).unwrap_or(0));
            carry /= 10;
            point += 1;
        }
    }
    let leading = digits.iter().take_while(|d| **d == 0).count();
    if point - leading as i64 > 30 {
        return MAX;
    }
    let keep = usize::try_from(point.max(0)).unwrap_or(0);
    let mut n: i128 = 0;
    for at in 0..keep {
        n = n.saturating_mul(10).saturating_add(i128::from(digits.get(at).copied().unwrap_or(0)));
    }
    // Rounded up, away from nothing.
    if digits.iter().skip(keep).any(|d| *d != 0) { n + 1 } else { n }
}

fn div_up(n: i128, by: i128) -> i128 {
    if n > 0 { (n + by - 1) / by } else { n / by }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canon(s: &str) -> String {
        canonical(s).unwrap_or_else(|| "none".into())
    }

    #[test]
    fn canonical_forms_are_kubernetes_ones() {
        let cases = [
            ("0", "0"),
            ("1", "1"),
            ("1.5", "1500m"),
            ("1.5Gi", "1536Mi"),
            ("1024", "1024"),
            ("1024Ki", "1Mi"),
            ("1000m", "1"),
            ("100m", "100m"),
            ("0.1m", "100u"),
            ("1e3", "1e3"),
            ("1000", "1k"),
            ("12E", "9223372036854775807"),
            ("64Mi", "64Mi"),
            ("500Mi", "500Mi"),
            ("-1", "-1"),
            ("+5", "5"),
            (".5", "500m"),
            ("5.", "5"),
            ("1E", "1E"),
            ("0.5Ki", "512"),
            ("0.0000000001", "1n"),
            ("1e-3", "1e-3"),
            ("4000k", "4M"),
        ];
        for (given, wanted) in cases {
            assert_eq!(canon(given), wanted, "{given}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for s in ["", "abc", "1Kib", "1.2.3", "--1", "Mi", "1 Gi", "1e", "1e1.5", "+", ".", "é"] {
            assert!(Quantity::parse(s).is_none(), "{s}");
        }
    }

    #[test]
    fn amounts_compare_across_notations() {
        let q = |s: &str| Quantity::parse(s).unwrap();
        assert_eq!(q("1Gi"), q("1073741824"));
        assert!(q("1G") < q("1Gi"));
        assert_eq!(q("1.1").milli(), 1100);
        assert_eq!(q("1m").units(), 1);
        assert_eq!(q("1Gi").plus(q("1Mi")).to_string(), "1025Mi");
        assert_eq!(q("2").minus(q("500m")).to_string(), "1500m");
    }

    proptest! {
        #[test]
        fn parse_never_panics_and_canonical_is_stable(s in "[+-]?[0-9.]{0,40}[eEinumkKMGTP]{0,2}[-+]?[0-9]{0,5}") {
            if let Some(q) = Quantity::parse(&s) {
                let once = q.to_string();
                let again = Quantity::parse(&once).unwrap();
                prop_assert_eq!(again, q);
                prop_assert_eq!(again.to_string(), once);
            }
        }

        #[test]
        fn any_text(s in any::<String>()) {
            let _ = Quantity::parse(&s);
        }
    }
}
