//! Figures for Prometheus, worked out when somebody asks for them; nothing of them is kept.
//!
//! They come from the task that owns the world, some objects at a time between two rounds of decisions, so that a scrape of a large cluster
//! holds up no decision.

use godwit_api::metrics::{self, Figures};
use godwit_control::figures::Census;
use godwit_control::{Noun, World};
use tokio::sync::{mpsc, oneshot};

/// So many objects are looked at between two rounds of decisions: some milliseconds of work.
pub(crate) const SLICE: usize = 64;
/// So many may ask at once.
const ASKING: usize = 8;

/// Asks the controllers for their figures.
#[derive(Clone, Debug)]
pub struct Scraper(mpsc::Sender<oneshot::Sender<Figures>>);

/// What is asked of the controllers.
#[derive(Debug)]
pub struct Scrapes(mpsc::Receiver<oneshot::Sender<Figures>>);

/// Both ends of it.
pub fn scraping() -> (Scraper, Scrapes) {
    let (ask, asked) = mpsc::channel(ASKING);
    (Scraper(ask), Scrapes(asked))
}

impl Scraper {
    /// The figures as they are now; none when the controllers have stopped.
    pub async fn figures(&self) -> Option<Figures> {
        let (answer, answered) = oneshot::channel();
        self.0.send(answer).await.ok()?;
        answered.await.ok()
    }
}

impl Scrapes {
    /// Whoever asks next; waits for ever when nobody can.
    pub(crate) async fn next(scrapes: &mut Option<Self>) -> oneshot::Sender<Figures> {
        if let Some(scrapes) = scrapes
            && let Some(asking) = scrapes.0.recv().await
        {
            return asking;
        }
        std::future::pending().await
    }
}

/// What a controller says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Standing {
    /// It has listed everything.
    pub ready: bool,
    /// It decides.
    pub leads: bool,
}

/// A census under way, and who waits for it.
#[derive(Default)]
pub(crate) struct Counting(Option<(Census, Vec<oneshot::Sender<Figures>>)>);

impl Counting {
    pub(crate) fn is_under_way(&self) -> bool {
        self.0.is_some()
    }

    /// Takes in that somebody asks. Who comes while others are waiting gets what they get.
    pub(crate) fn ask(&mut self, asking: oneshot::Sender<Figures>, nouns: &[Noun], world: &World) {
        let (_, waiting) = self.0.get_or_insert_with(|| (Census::begin(nouns, world), Vec::new()));
        waiting.push(asking);
    }

    /// Looks at some more, and answers when that was all. Only the controller that decides tells of the cluster: of two that do, each
    /// figure would be there twice.
    pub(crate) fn go_on(&mut self, standing: Standing, nouns: &[Noun], version: &str, world: &World) {
        let Some((census, _)) = &mut self.0 else { return };
        let figures = if standing.leads { census.go_on(SLICE, world) } else { Some(Figures::default()) };
        let Some(mut figures) = figures else { return };
        // Beside another KubeVirt that tells of its own.
        if nouns.contains(&Noun::Migration) {
            let yes = |yes: bool| f64::from(u8::from(yes));
            figures.tell(metrics::INFO, [version], 1.0);
            figures.tell(metrics::CONTROLLER_READY, [], yes(standing.ready));
            figures.tell(metrics::CONTROLLER_LEADING, [], yes(standing.leads));
        }
        let waiting = self.0.take().map(|(_, waiting)| waiting).unwrap_or_default();
        for asking in waiting {
            // Who does not wait any more is not told.
            let _ = asking.send(figures.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use godwit_control::{Kind, Object, Source};
    use serde_json::json;

    use super::*;

    fn world(vmis: usize) -> World {
        let mut world = World::default();
        for number in 0..vmis {
            let vmi = json!({
                "metadata": {"name": format!("vm{number}"), "namespace": "default", "resourceVersion": (number + 1).to_string()},
                "status": {"phase": "Running", "nodeName": "node1"},
            });
            world.apply(Object::from_value(Kind::VirtualMachineInstance, vmi).unwrap(), Source::Watch);
        }
        world
    }

    #[tokio::test]
    async fn who_asks_meanwhile_gets_the_same_and_nothing_is_kept() {
        let (world, nouns) = (world(2 * SLICE + 1), Noun::CLUSTER);
        let standing = Standing { ready: true, leads: true };
        let mut counting = Counting::default();
        let (first, first_told) = oneshot::channel();
        counting.ask(first, nouns, &world);
        counting.go_on(standing, nouns, "v1", &world);
        assert!(counting.is_under_way(), "it is not all looked at in one go");
        let (second, second_told) = oneshot::channel();
        counting.ask(second, nouns, &world);
        for _ in 0..3 {
            counting.go_on(standing, nouns, "v1", &world);
        }
        assert!(!counting.is_under_way());
        let (first, second) = (first_told.await.unwrap(), second_told.await.unwrap());
        assert_eq!(first, second);
        assert_eq!(first.value(metrics::VMI_PHASES, ["node1", "running"]), Some(2.0 * SLICE as f64 + 1.0));
        assert_eq!(first.value(metrics::CONTROLLER_LEADING, []), Some(1.0));
        assert_eq!(first.value(metrics::INFO, ["v1"]), Some(1.0));
    }

    #[tokio::test]
    async fn who_does_not_decide_tells_of_itself_only() {
        let world = world(1);
        for (standing, ready) in
            [(Standing { ready: true, leads: false }, 1.0), (Standing { ready: false, leads: false }, 0.0)]
        {
            let (asking, told) = oneshot::channel();
            let mut counting = Counting::default();
            counting.ask(asking, Noun::CLUSTER, &world);
            counting.go_on(standing, Noun::CLUSTER, "v1", &world);
            let told = told.await.unwrap();
            assert_eq!(told.value(metrics::CONTROLLER_READY, []), Some(ready));
            assert_eq!(told.value(metrics::CONTROLLER_LEADING, []), Some(0.0));
            assert_eq!(told.families().count(), 3);
        }
    }

    #[tokio::test]
    async fn a_controller_that_has_stopped_answers_nothing() {
        let (scraper, scrapes) = scraping();
        drop(scrapes);
        assert_eq!(scraper.figures().await, None);
    }
}
